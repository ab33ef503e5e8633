"""The language model: embedding -> blocks -> norm -> head, with tensor-parallel layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, cast

from torch import Tensor

from pretrain.common.metrics import merge_metrics
from pretrain.config import ModelConfig
from pretrain.data.sequences import Sequences, check_fits, given_sequences
from pretrain.model.block import Block, FirstValues, make_blocks, run_block
from pretrain.model.carried import CarriedStates
from pretrain.model.depth_lora import add_depth_lora
from pretrain.model.head import WithHead
from pretrain.model.positions import token_positions
from pretrain.model.recursion import Recursion
from pretrain.model.segmented import comes_in_segments, segmented_losses
from pretrain.model.shared import FirstValuesOnTheWay, make_tables
from pretrain.model.spec import block_specs, passes
from pretrain.model.stages import Stage, whole_model
from pretrain.nn.dropout import EMBEDDING, DropAt, Dropout
from pretrain.nn.linear import VocabParallelEmbedding, column_input, column_linear
from pretrain.nn.mixers import LayerContext, State
from pretrain.nn.moe import MoE
from pretrain.nn.norm import NORMS
from pretrain.nn.parameters import change_info
from pretrain.parallel.context import ParallelContext
from pretrain.parallel.megatron import viewless

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from pretrain.data.teacher_top import TeacherTop
    from pretrain.model.distillation import Distillation


class LanguageModel(WithHead):
    """A causal language model over packed sequences, or one stage of it.

    Parameters have the same names in a stage as in the full model. Raises ConfigError where the
    settings do not fit each other.
    """

    # What megatron-core's schedules ask a stage for; see pretrain.parallel.megatron.prepare.
    config: TransformerConfig
    vp_stage: int | None = None
    segment_tokens: int | None = None  # of a row's losses; see pretrain.model.segmented
    carried: CarriedStates | None = None  # of rows from step to step, in training
    layer_path: tuple[int, ...] | None = None  # see pretrain.inference.layer_paths
    distilled: Distillation | None = None  # what training learns from a teacher
    # While open, gradients that add up are not reduced yet.
    reduction_paused: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        context: ParallelContext,
        *,
        stage: Stage | None = None,
        activation_checkpointing: str = "none",
        seq_len: int | None = None,
    ):
        """Build the model, or ``stage`` of it, to train on sequences of ``seq_len``; None: rows."""
        super().__init__()
        specs = block_specs(config)
        self.stage = stage = stage or whole_model(config)
        self.pre_process, self.post_process = stage.first, stage.last
        self.share_embeddings_and_output_weights = config.tie_embeddings
        self.model_config, self.vocab_size, self.context = config, vocab_size, context
        self.activation_checkpointing = activation_checkpointing
        d, recursion = config.hidden_size, config.recursion
        depth = (2 * sum(passes(config))) ** -0.5 if config.depth_scaled_init else 1.0
        base = config.mup_base_hidden_size
        self._width = d / base if base is not None else 1.0
        inner = context.with_width(self._width)
        if stage.first or (stage.last and config.tie_embeddings):
            self.embedding = VocabParallelEmbedding(context, vocab_size, d, config.init_std)
            if config.tie_embeddings and not (stage.first and stage.last):
                # Gradients are summed over both copies; the first one counts in norms.
                change_info(self.embedding.weight, tied=True, copy=not stage.first)
        self.dropout = Dropout(config.dropout, seq_len, context) if config.dropout > 0 else None
        self._received: Tensor | None = None
        self._on_the_way = FirstValuesOnTheWay(config, context)
        self.tables = make_tables(config, stage.blocks, inner)
        layer = LayerContext(
            d, config.init_std, config.init_std * depth, inner, 0, len(specs), seq_len
        )
        self.blocks = make_blocks(config, stage.blocks, layer, self.tables)
        self.recursion: Recursion | None = None
        self.loop = range(0)  # the blocks that a recursive model runs several times
        if recursion is not None and recursion.prelude in stage.blocks:
            self.recursion = Recursion(recursion, d, config.init_std, inner, seq_len)
            self.loop = range(recursion.prelude, len(specs) - recursion.coda)
            if recursion.lora_rank:
                for index in self.loop:
                    add_depth_lora(self.blocks[index], recursion.times, recursion.lora_rank, inner)
        if stage.last:
            self.final_norm = NORMS[config.norm](d, config.norm_eps, context)
            if not config.tie_embeddings:
                self.head = column_linear(context, d, vocab_size, config.init_std, precise=True)
                change_info(self.head.weight, matrix=False)

    def begin_step(self, seed: int, step: int, rank: int = 0, world_size: int = 1) -> None:
        """Set what randomness in training is drawn from: (seed, step) and the micro-batch's number.

        Micro-batches are numbered in the global batch; the data-parallel ranks, of which this
        process is number ``rank`` of ``world_size``, take them in turn. What :meth:`update_biases`
        would go by is forgotten: a step that was left out leaves no trace.
        """
        for drawing in (self.dropout, self.recursion, self.carried):
            if drawing is not None:
                drawing.begin_step(seed, step, rank, world_size)
        for experts in self.experts():
            experts.forget_load()

    @property
    def border_width(self) -> int:
        """Return the width of what the stages of a pipeline send each other."""
        taught = 0 if self.distilled is None else self.distilled.width
        return self.model_config.hidden_size + self._on_the_way.width + taught

    @property
    def embedding_factor(self) -> float:
        """Return what embeddings are multiplied by."""
        config = self.model_config
        root = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        return root * config.embedding_scale

    def set_input_tensor(self, tensor: Sequence[Tensor | None]) -> None:
        """Receive the previous stage's output ``[T, B, d]`` from megatron-core's schedules."""
        received = tensor[0]
        if self.distilled is not None and received is not None:
            received = self.distilled.receive(received)
        self._received = received

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return what the first and the last stage both hold a copy of, for megatron-core."""
        return cast(Tensor, self.embedding.weight) if hasattr(self, "embedding") else None

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        sequences: Sequences | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scored: Tensor | None = None,
        candidates: int | None = None,
        mask: Tensor | None = None,
        top: TeacherTop | None = None,
    ) -> Tensor:
        """Compute the losses of ``targets``, or logits: tokens, targets ``[B, T]`` int64.

        With ``sequences`` (or their tensor ``cu_seqlens`` ``[N + 1]``) B is 1 and N sequences are
        packed along T.

        Returns each target's cross entropy ``[B, T]`` in nats, float32 or wider; without targets,
        the logits ``[B, T, vocab]`` (this rank's shard of the vocabulary). A stage that is not
        the last returns the input of the next one, ``[T, B, d]``. With ``scored``, ``[M]``
        numbers of tokens of one row: :meth:`score` of their targets. Where it learns from a
        teacher, metrics count targets by ``mask`` ``[B, T]``, and ``top`` is what the teacher said
        of the tokens, if it is not here.
        """
        packed = given_sequences("the model", sequences, cu_seqlens)
        if targets is not None and scored is None and comes_in_segments(self, tokens):
            return segmented_losses(self, tokens, targets, packed)
        if self.distilled is not None and self.training and targets is not None:
            return self.distilled.losses(tokens, targets, packed, mask, top)
        firsts: dict[str, FirstValues] = {}
        earlier: list[Tensor] = []
        x, _, ponder = self._hidden(
            tokens, packed, None, with_states=False, firsts=firsts, earlier=earlier
        )
        if not self.stage.last:
            sent = self._on_the_way.pack(x, firsts)
            return viewless(sent if self.distilled is None else self.distilled.pack(sent))
        if targets is None:
            return self._logits(x).transpose(0, 1)
        if scored is not None:
            x = column_input(self._head_input(x), self.context)[:, 0]
            return self._score(x[scored], targets[0, scored], candidates)
        losses = self._losses(x, targets.t().contiguous()).t()
        if ponder is not None and self.training:
            losses = cast(Recursion, self.recursion).with_cost(losses, ponder)
        if earlier and self.recursion is not None:
            exits = self._exit_losses(earlier, x, targets, self.recursion.config.exit_distill)
            losses = self.recursion.with_exits(losses, exits)
        return losses

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        sequences: Sequences | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return the last block's output for each token, ``[B, T, d]``, before the final norm.

        tokens ``[B, T]`` int64; with ``sequences`` (or ``cu_seqlens``) B is 1 and they are packed.
        """
        packed = given_sequences("the model", sequences, cu_seqlens)
        x, _, _ = self._hidden(tokens, packed, None, with_states=False)
        return x.transpose(0, 1)

    def states(
        self,
        tokens: Tensor,
        *,
        sequences: Sequences | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> list[State]:
        """Return what each block carries from tokens ``[B, T]`` to the next one.

        There is one state per block, for blocks of a loop one per pass, in the order in which they
        run; :meth:`forward_with_state` continues from them.
        """
        packed = given_sequences("the model", sequences, cu_seqlens)
        return self._hidden(tokens, packed, None, with_states=True)[1]

    def forward_with_state(
        self,
        tokens: Tensor,
        states: list[State] | None,
        *,
        sequences: Sequences | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """Return logits ``[B, T, vocab]`` and the states to continue from, see :meth:`states`."""
        packed = given_sequences("the model", sequences, cu_seqlens)
        x, states, _ = self._hidden(tokens, packed, states, with_states=True)
        return self._logits(x).transpose(0, 1), states

    def hidden_with_state(
        self,
        tokens: Tensor,
        states: list[State] | None,
        *,
        sequences: Sequences | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """Return hidden rows ``[B * T, d]`` for :meth:`score` and :meth:`next_logits`, and states.

        The states are those of :meth:`forward_with_state`. The model must be neither a stage nor
        run with sequence parallelism.
        """
        packed = given_sequences("the model", sequences, cu_seqlens)
        x, states, _ = self._hidden(tokens, packed, states, with_states=True)
        return x.transpose(0, 1).flatten(0, 1), states

    def select_states(self, states: list[State], indices: Tensor) -> list[State]:
        """Return the states of some of the sequences, in the order of ``indices``."""
        return [
            cast(Block, self.blocks[index]).states.select_state(state, indices)
            for index, state in zip(self.blocks_by_state(), states, strict=True)
        ]

    def blocks_by_state(self, times: int | None = None) -> list[int]:
        """Return the number of the block that each state is of, with ``times`` passes of a loop."""
        loop, local = self.loop, self.stage.blocks
        if self.recursion is None:
            return [*(local if self.layer_path is None else self.layer_path)]
        times = times or self.recursion.num_passes()
        return [*range(local.start, loop.start), *[*loop] * times, *range(loop.stop, local.stop)]

    def _hidden(
        self,
        tokens: Tensor,
        sequences: Sequences | None,
        states: list[State] | None,
        *,
        with_states: bool,
        drop: DropAt | None = None,
        firsts: dict[str, FirstValues] | None = None,
        earlier: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[State], Tensor | None]:
        """Return the last block's output ``[T, B, d]``, the states, and a loop's ponder cost.

        ``drop`` is the dropout of a call with states, which without it has none; ``firsts`` takes
        what first blocks hand on, and ``earlier`` what the output would be after fewer passes,
        where the loss has a part of it.
        """
        firsts = {} if firsts is None else firsts
        if sequences is not None and self.stage.first:
            check_fits("the model", sequences, *tokens.shape)
        x = self.embed(tokens, firsts)
        new_states: list[State] = []
        if self.dropout is not None and self.training and not with_states:
            drop = self.dropout.next_micro_batch()
        x = drop(x, EMBEDDING) if drop is not None and self.stage.first else x
        carried = self.carried if self.training and not with_states else None
        if carried is not None and sequences is not None:
            states, with_states = carried.enter(sequences), True
        after = new_states if with_states else None
        run = partial(
            self.run_blocks,
            sequences=sequences,
            drop=drop,
            states=states,
            after=after,
            firsts=firsts,
        )
        ponder, local = None, self.stage.blocks
        if self.recursion is None:
            x = run(x, local if self.layer_path is None else self.layer_path)
        else:
            x = run(x, range(local.start, self.loop.start))
            before = list[Tensor]() if earlier is not None and self.recursion.learns_exits else None
            positions = None
            if self.recursion.config.step_signal == "coordinate":
                positions = token_positions(tokens, sequences, states, self.context)
            x, ponder = self.recursion(
                x,
                lambda state, index: run(state, self.loop, depth=index),
                all_passes=with_states,
                positions=positions,
                earlier=before,
            )
            coda, handed = range(self.loop.stop, local.stop), dict(firsts)
            x = run(self.after_loop(x), coda)
            for state in before or ():
                x_before = self.after_loop(state)
                x_before = self.run_blocks(
                    x_before, coda, sequences, drop=drop, firsts=dict(handed)
                )
                cast(list[Tensor], earlier).append(x_before)
        if carried is not None:
            carried.leave(new_states)
        return x, new_states, ponder

    def after_loop(self, state: Tensor) -> Tensor:
        """Return what the coda takes of the loop's state."""
        recursion = cast(Recursion, self.recursion)
        return self.final_norm(state) if recursion.config.normalize_state else state

    def run_blocks(
        self,
        x: Tensor,
        indices: Sequence[int],
        sequences: Sequences | None,
        depth: int = 0,
        drop: DropAt | None = None,
        states: list[State] | None = None,
        after: list[State] | None = None,
        firsts: dict[str, FirstValues] | None = None,
    ) -> Tensor:
        """Run x ``[T, B, d]`` through some blocks, at pass ``depth`` of a loop.

        ``after``: takes the state behind each block; those before are ``states``, from as many on.
        ``firsts``: what the first blocks of each kind have handed on, and takes what these do.
        """
        firsts = {} if firsts is None else firsts
        kept = self.activation_checkpointing if self.training else "none"
        for index in indices:
            block = cast(Block, self.blocks[index])
            old = None if states is None or after is None else states[len(after)]
            keeps = after is not None
            x, state = run_block(block, x, sequences, depth, drop, kept, old, keeps, firsts)
            if after is not None:
                after.append(cast(State, state))
        return x

    def embed(self, tokens: Tensor, firsts: dict[str, FirstValues] | None = None) -> Tensor:
        """Return what the blocks start from, ``[T, B, d]``: of a later stage what it received."""
        if not self.stage.first:
            received, self._received = self._received, None
            assert received is not None
            x, handed = self._on_the_way.unpack(received)
            if firsts is not None:
                firsts.update(handed)
            return x
        x = cast(Tensor, self.embedding(tokens))
        return x if self.embedding_factor == 1 else x * self.embedding_factor

    def metrics(self) -> dict[str, float]:
        """Return and reset the metrics that the blocks of this process accumulated."""
        found = self.mixer_metrics()
        for experts in self.experts():
            merge_metrics(found, experts.metrics())
        if self.distilled is not None:
            merge_metrics(found, self.distilled.metrics())
        return found

    def mixer_metrics(self) -> dict[str, float]:
        """Return and reset those of the mixers alone."""
        found: dict[str, float] = {}
        for index in self.stage.blocks:
            merge_metrics(found, cast(Block, self.blocks[index]).mixer.metrics())
        return found

    def update_biases(self) -> None:
        """Update the biases of all MoE layers after an optimizer step, by its tokens."""
        for experts in self.experts():
            experts.update_bias()

    def experts(self) -> list[MoE]:
        """Return the MoE layers of this stage."""
        mlps = (cast(Block, self.blocks[index]).mlp for index in self.stage.blocks)
        return [mlp for mlp in mlps if isinstance(mlp, MoE)]
