"""Fixtures of these tests."""

from tests.helpers.data_fixtures import (  # noqa: F401
    model_file,
    stdlib_documents,
    text_folder,
)
