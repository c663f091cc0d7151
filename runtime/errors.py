"""Every exception that moecc raises.

    MoeccError
    ├── OptionError        an option is unknown or has a bad value       (also a ValueError)
    ├── PassError          a compiler pass failed; names the pass
    ├── StrictError        `strict=True` and something would have fallen back
    ├── UnsupportedSpec    an emitter cannot write this kernel; says why
    │   └── NoCompiler     there is no C++ compiler that works
    ├── BuildError         a compiler refused emitted code
    ├── InputError         a kernel was called with tensors that do not fit its spec (a ValueError)
    ├── StoreError         experts cannot be read from disk, or are not what was written
    ├── ParallelError      a rank that shares experts died, hangs or lost the others; names it
    ├── ModelError         MODEL on the command line cannot be loaded
    └── MissingExtra       an optional package is needed; says what to install (an ImportError)

A message says what, where and what to do. Dynamo wraps what a backend raises in its own error, so
each message stands alone.
"""


class MoeccError(Exception):
    """Anything that moecc raises on purpose."""


class OptionError(MoeccError, ValueError):
    """An option is unknown or has a bad value."""


class PassError(MoeccError):
    """A compiler pass failed."""


class StrictError(MoeccError):
    """With `strict=True`, something that would otherwise be a line in the report."""


class UnsupportedSpec(MoeccError):
    """An emitter cannot write this kernel; the message is the reason in the report."""


class NoCompiler(UnsupportedSpec):
    """No C++ compiler was found, or the one found does not work."""


class BuildError(MoeccError):
    """A compiler refused emitted code; the message holds its first complaint."""


class InputError(MoeccError, ValueError):
    """A kernel was called with tensors that do not fit its spec."""


class StoreError(MoeccError):
    """Experts cannot be read from where they are kept, or are not what was written there."""


class ParallelError(MoeccError):
    """Ranks that share experts cannot go on together; the message names who and where."""


class ModelError(MoeccError):
    """A MODEL argument names nothing that can be loaded."""


class MissingExtra(MoeccError, ImportError):
    """An optional package is not installed."""
