"""Grow the windows of ``n_parity`` as they are learned (arXiv 2309.12927)."""

from __future__ import annotations

import numpy as np
import torch

from evals.synthetic.settings import SyntheticConfig
from evals.synthetic.tasks import make_rows
from pretrain.model.language_model import LanguageModel

ENOUGH = 0.98  # of the answers, for the next window
EVERY = 25  # steps between the tests of that
_ROWS = 512


class Windows:
    """The windows that training asks for, and the widest one that was learned."""

    def __init__(self, config: SyntheticConfig):
        """Begin with a window of 2 bits, or without a curriculum with the last one."""
        self.config, self.reached = config, 1
        self.now: tuple[int, ...] = (config.window if config.window_curriculum == "none" else 2,)

    def length(self, step: int) -> int:
        """Return the length of a step's rows: their bits are N + 2 to 4 N, as drawn for it."""
        widest = self.now[-1]
        drawn = np.random.default_rng([self.config.seed, step, widest]).integers(
            widest + 2, 4 * widest + 1
        )
        return 1 + int(drawn) + len(self.now)

    def after(self, model: LanguageModel, step: int) -> None:
        """Test the windows every few steps and widen them when they are learned."""
        if (step + 1) % EVERY:
            return
        right = self._right(model, step)
        if right.mean() <= ENOUGH or right[-1] <= ENOUGH:
            return
        config, widest = self.config, self.now[-1]
        self.reached = max(self.reached, widest)
        if widest < config.window:
            kept = self.now if config.window_curriculum == "cumulative" else ()
            self.now = (*kept, widest + 1)

    @torch.no_grad()
    def _right(self, model: LanguageModel, step: int) -> np.ndarray:
        model.eval()
        rows = make_rows(
            "n_parity",
            seed=self.config.seed,
            stream="check",
            index=step,
            rows=_ROWS,
            length=self.length(step),
            options=self.config.options(self.now),
        )
        found = model(torch.from_numpy(rows.tokens)).argmax(-1).numpy()
        model.train()
        asked = len(self.now)
        share: np.ndarray = (found == rows.targets)[:, -asked:].mean(0)
        return share
