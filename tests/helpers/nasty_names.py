"""Names that markup, formulas, tables, shells and file names would take for something else."""

from __future__ import annotations

import random

NAMES = [
    *("$", "$x$", "a$b$c", r"$\frac{$", r"\$", "_hidden", "a_b^c", "{x}", "%s %d"),
    *("[red]", "[/]", "[bold]x[/bold]", ":smile:", ":x:", "<b>&amp;</b>", '"quoted"', "it's"),
    *("a|b", "`code`", "</script><script>", "{{ 7 * 7 }}", "{% raw %}", "naïve", "#", "a b"),
]


def random_names(count: int, seed: int = 0) -> list[str]:
    """Return different names that join some of these, without the separator of paths."""
    generator = random.Random(seed)
    found = dict[str, None]()
    while len(found) < count:
        name = "".join(generator.choices(NAMES, k=generator.randint(1, 3))).replace("/", "-")
        if "${" not in name:  # a reference to another setting, in YAML files
            found[name] = None
    return list(found)
