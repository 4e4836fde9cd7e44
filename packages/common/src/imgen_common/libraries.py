"""Manners of other libraries."""


def quiet_libraries() -> None:
    """Progress bars and advice of diffusers and transformers off: their users here are not those who call them."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
