"""One client for every HTTP service, and how the answers of chat endpoints are read.

It knows no model, prompt or image.
"""

from imgen_common.http.addresses import CONNECT_SECONDS, ServiceUrl, check_url, redacted, version_hint
from imgen_common.http.client import HttpClient, run_in_thread
from imgen_common.http.failures import (
    HttpError,
    HttpFailure,
    Refusal,
    error_in_answer,
    error_message,
    failure_of_status,
    retry_after,
)
from imgen_common.http.retry import CircuitBreaker, RetryingCaller, RetryPolicy

__all__ = [
    "CONNECT_SECONDS",
    "CircuitBreaker",
    "HttpClient",
    "HttpError",
    "HttpFailure",
    "Refusal",
    "RetryPolicy",
    "RetryingCaller",
    "ServiceUrl",
    "check_url",
    "error_in_answer",
    "error_message",
    "failure_of_status",
    "redacted",
    "retry_after",
    "run_in_thread",
    "version_hint",
]
