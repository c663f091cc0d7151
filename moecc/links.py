"""Make links whose readers need no turn of the interpreter's, where there is a compiler."""

import functools
import logging

from moecc.codegen.native.readers import load_readers
from moecc.runtime.errors import BuildError, NoCompiler
from moecc.runtime.offload.link import READERS, Link
from moecc.runtime.offload.native_readers import NativeReaders

_log = logging.getLogger(__name__)


def new_link(readers: int = READERS, limit: float | None = None) -> Link:
    """Make a link of so many reader threads; `limit` is in bytes a second, as `Link` says.

    Without a compiler its threads take turns with the model's Python code, and the experts report
    says so.
    """
    try:
        library = load_readers()
    except (NoCompiler, BuildError) as error:
        _log.warning("experts are read by Python threads: %s", error)
        return Link(readers, limit)
    return Link(readers, limit, functools.partial(NativeReaders, library))
