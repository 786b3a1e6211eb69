"""The library's errors in the words of NIXL's bindings."""

from __future__ import annotations

from .. import errors
from ._bindings import (
    nixlBackendError,
    nixlCancelledError,
    nixlInvalidParamError,
    nixlNotAllowedError,
    nixlNotFoundError,
    nixlNotSupportedError,
    nixlRemoteDisconnectError,
)

_BY_ERROR = (
    (errors.UnknownAddress, nixlNotFoundError),
    ((errors.Lost, errors.Refused, errors.Late), nixlRemoteDisconnectError),
    ((errors.Busy, errors.TimedOut), nixlNotAllowedError),
    (errors.BadArgument, nixlInvalidParamError),
    (errors.Unsupported, nixlNotSupportedError),
    ((errors.Abandoned, errors.Stopped, errors.BadHandle), nixlCancelledError),
)


def translated(error: errors.Error) -> Exception:
    for kinds, kind in _BY_ERROR:
        if isinstance(error, kinds):
            return kind(str(error))
    return nixlBackendError(str(error))
