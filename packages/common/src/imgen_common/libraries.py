"""Manners of other libraries."""

import warnings


def quiet_libraries() -> None:
    """Progress bars and advice of diffusers and transformers off: their users here are not those who call them.

    So are transformers' warnings of what it will rename, which TRL and accelerate call by the old names.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
