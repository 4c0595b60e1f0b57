"""Exceptions of the package; each also derives from the built-in that fits it best."""


class GradiendError(Exception):
    """Base class of all errors that the package raises on purpose."""


class SelectionError(GradiendError, ValueError):
    """A selection of weights names nothing, or something that the model does not have."""


class DataError(GradiendError, ValueError):
    """Texts or words do not have the form that the package needs."""


class BaseModelError(GradiendError, ValueError):
    """A base model cannot be used for what was asked of it."""


class ConfigError(GradiendError, ValueError):
    """A setting has a value that is not allowed or contradicts another one."""


class CompatibilityError(GradiendError, ValueError):
    """A GRADIEND was made for another base model than the one at hand."""


class NumericalError(GradiendError, ArithmeticError):
    """A computation gave NaN or infinity, or left the range where it can be trusted."""


class OutputError(GradiendError, OSError):
    """A result cannot be written to the place that was asked for."""


def first_line_of(error: BaseException) -> str:
    """The first line of a library's message, for use within one line of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
