"""The tests mirror the package. The type checker is imported: the import hook looks it up as an attribute."""

from tests import typecheck

__all__ = ["typecheck"]
