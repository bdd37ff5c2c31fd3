"""The tests mirror the package. The type checker is imported here because the import hook looks it up as an attribute."""

from tests import typecheck

__all__ = ["typecheck"]
