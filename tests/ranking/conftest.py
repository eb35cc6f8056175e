"""The fixtures that ranking shares with the recommenders."""

from tests.recommenders.conftest import make_table, retrieval_params

__all__ = ["make_table", "retrieval_params"]
