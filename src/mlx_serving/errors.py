"""Every error a user can meet, drawn once.

    MLXServingError
    ├── InvalidRequest            400  change the request
    │   ├── UnsupportedParameter  400  drop or change the named parameter
    │   ├── ContextOverflow       400  shorten the prompt
    │   └── ModelTooLarge         400  pick another model, or give the server more memory
    ├── Unauthorized              401  send a key
    ├── Forbidden                 403  this key may not
    ├── ModelNotFound             404  pick another model
    ├── RequestNotFound           404  nothing by that id
    ├── BodyTooLarge              413  send less
    ├── RateLimited               429  wait, then retry
    ├── Cancelled                 499  the client went away or cancelled
    ├── ServerError               500  ours; report it
    │   └── WorkerDied            500  the worker died under this request; retry
    ├── TimedOut                  504  ask for less, or allow it more time
    │   └── DeadlineExceeded      504  the request's own 'timeout'
    ├── ModelBroken               503  the model's files or this runtime: see the reason
    ├── Overloaded                503  wait, then retry (Retry-After)
    ├── Draining                  503  the server is shutting down
    └── ConfigError               exit 2: a flag, variable or file is wrong

The status is chosen by what the reader should do next. `param` names the field at
fault, in the wire body's own spelling; `code` is stable and machine-readable.
"""

from __future__ import annotations


class MLXServingError(Exception):
    """Base of everything this project raises on purpose.

    Attributes:
        status: HTTP status code.
        type: OpenAI's `error.type`.
        code: stable machine-readable reason, OpenAI's `error.code`.
        param: path of the field at fault (`messages[0].role`), or None.
        retry_after_s: seconds after which a retry makes sense, or None.
    """

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class InvalidRequest(MLXServingError):
    status, type, code = 400, "invalid_request_error", "invalid_value"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class ContextOverflow(InvalidRequest):
    code = "context_length_exceeded"


class ModelTooLarge(InvalidRequest):
    code = "model_too_large"


class Unauthorized(MLXServingError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(MLXServingError):
    status, type, code = 403, "permission_error", "forbidden"


class ModelNotFound(MLXServingError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class RequestNotFound(MLXServingError):
    status, type, code = 404, "invalid_request_error", "not_found"


class BodyTooLarge(MLXServingError):
    status, type, code = 413, "invalid_request_error", "body_too_large"


class RateLimited(MLXServingError):
    status, type, code = 429, "rate_limit_error", "rate_limited"


class Cancelled(MLXServingError):
    status, type, code = 499, "invalid_request_error", "cancelled"


class ServerError(MLXServingError):
    pass


class WorkerDied(ServerError):
    code = "worker_died"


class TimedOut(MLXServingError):
    status, type, code = 504, "timeout_error", "timed_out"


class DeadlineExceeded(TimedOut):
    code = "deadline_exceeded"


class ModelBroken(MLXServingError):
    status, type, code = 503, "server_error", "model_unavailable"


class Overloaded(MLXServingError):
    status, type, code = 503, "overloaded_error", "overloaded"


class Draining(MLXServingError):
    status, type, code = 503, "overloaded_error", "draining"


class ConfigError(MLXServingError):
    """A flag, an environment variable or a line of the config file is wrong.

    `param` says where: `--max-num-seqs`, `MLX_SERVING_PORT`, `serve.yaml: line 3, key 'prot'`.
    """

    status, type, code = 500, "config_error", "invalid_config"


_BY_CODE: dict[str, type[MLXServingError]] = {}


def _register(cls: type[MLXServingError]) -> None:
    _BY_CODE.setdefault(cls.code, cls)
    for sub in cls.__subclasses__():
        _register(sub)


_register(MLXServingError)


def from_code(code: str, message: str, *, param: str | None = None) -> MLXServingError:
    """Rebuild an error that crossed the worker's wire; an unknown code is a ServerError."""
    cls = _BY_CODE.get(code, ServerError)
    return cls(message, param=param, code=code)
