"""docs/settings.md: in step with the dataclasses, every field explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pretrain.common.config_loader import Config
from pretrain.settings_page import field_docs, page, schemas

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def test_the_page_is_the_dataclasses():
    assert PAGE.read_text() == page(), "run: python -m pretrain.settings_page > docs/settings.md"


@pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.__name__)
def test_every_setting_is_explained_and_checked(schema):
    assert issubclass(schema, Config)
    docs = field_docs(schema)
    for field in dataclasses.fields(schema):
        assert docs.get(field.name, "").endswith((".", ").")), field.name
