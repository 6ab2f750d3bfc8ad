"""A model's own gradient checkpointing: respected, counted once, and dropout draws the same again."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import evenflow
from unsplit import assert_same_step, assert_splits, mean_square, pipeline_step, regression, seeded

WIDTH = 4


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(torch.tanh(self.up(x))))


class ByModule(nn.Module):
    """A parent that checkpoints its blocks, as most do."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(3))
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


class Around(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=True)


class Reentrant(ByModule):
    """Nobody sees into a reentrant checkpoint: the module that calls it stays whole."""

    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        self.blocks = nn.ModuleList(Around(block) for block in self.blocks)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class ByFunction(ByModule):
    """Checkpoints pieces of its own code, with draws among them."""

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:

            def piece(x, block=block):
                h = functional.dropout(block.up(x), block.dropout.p, self.training)
                return x + functional.dropout(block.down(torch.tanh(h)), block.dropout.p, self.training)

            x = checkpoint(piece, x, use_reentrant=False)
        return self.last(x)


class OwnCall(Block):
    """Checkpoints itself, by a `__call__` of its own, as transformers' layers do."""

    def __call__(self, *args):
        return checkpoint(super().__call__, *args, use_reentrant=False)


class ByItself(ByModule):
    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        self.blocks = nn.ModuleList(OwnCall(dropout) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Nested(ByModule):
    def forward(self, x):
        def outer(x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

        return self.last(checkpoint(outer, self.first(x), use_reentrant=False))


MODELS = [ByModule, Reentrant, ByFunction, ByItself, Nested]


@pytest.mark.parametrize("model", MODELS)
def test_every_cut_gives_the_same_numbers(model):
    assert_splits(seeded(model), regression(), loss=mean_square)


@pytest.mark.parametrize("model", MODELS)
def test_dropout_draws_the_same_numbers_again(model):
    def step(stages, share, schedule):
        built = seeded(lambda: model(0.5))()
        pipe = evenflow.pipeline(
            built,
            loss=mean_square,
            example=regression(),
            stages=stages,
            max_leaf_share=share,
            num_microbatches=4,
            schedule=schedule,
        )
        found = pipeline_step(pipe, built, regression())
        pipe.close()
        return found

    expected = step(1, None, "gpipe")
    for stages, share, schedule in (
        (2, None, "1f1b"),
        (2, 0.0, "zb-h1"),
        (3, 0.0, "gpipe"),
        (1, 0.0, "zb-h1"),
    ):
        assert_same_step(step(stages, share, schedule), expected)


@pytest.mark.parametrize("model", [model for model in MODELS if model is not Reentrant])
def test_the_gradients_with_dropout_are_those_of_the_numbers_drawn(model):
    """Recomputed with other draws, gradients would be wrong: without recomputation they are the same.

    But in a reentrant checkpoint, whose draws follow from the generator's state at its beginning.
    """

    class Plain(model):
        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = Block.forward(block, x) if model is not ByFunction else self.piece(block, x)
            return self.last(x)

        def piece(self, block, x):
            h = functional.dropout(block.up(x), block.dropout.p, self.training)
            return x + functional.dropout(block.down(torch.tanh(h)), block.dropout.p, self.training)

    def step(kind):
        built = seeded(lambda: kind(0.5))()
        pipe = evenflow.pipeline(
            built, loss=mean_square, example=regression(), stages=2, max_leaf_share=0.0, num_microbatches=2
        )
        found = pipeline_step(pipe, built, regression())
        pipe.close()
        return found

    assert_same_step(step(model), step(Plain))


@pytest.mark.parametrize("share", [None, 0.0])
def test_a_block_is_computed_twice_and_no_more(share):
    def loss(model, batch):
        h = checkpoint(model, batch["x"], use_reentrant=False)
        return functional.mse_loss(h, batch["y"])

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    ran = []
    model[1].register_forward_hook(lambda *_: ran.append(1))
    pipe = evenflow.pipeline(
        model, loss=loss, example=regression(), stages=1, num_microbatches=2, max_leaf_share=share
    )
    ran.clear()
    pipe.step(regression())
    assert len(ran) == 4, "forward and recomputation of two microbatches"


def test_what_a_checkpoint_made_is_not_kept():
    """Else checkpointing would save no memory: of the blocks' activations only their inputs are saved."""
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 1000), nn.Linear(1000, WIDTH)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    def loss(model, batch):
        return checkpoint(model[1], model[0](batch["x"]), use_reentrant=False).square().mean()

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Wide())
    pipe = evenflow.pipeline(
        model, loss=loss, example=regression(), stages=1, num_microbatches=1, max_leaf_share=0.0
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pipe.step(regression())
    assert max(saved) < 1000 * 8, "an activation of the wide layer was saved"


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) / self.calls


@pytest.mark.parametrize("kind", [ByModule, Reentrant])
@pytest.mark.parametrize(
    ("inner", "name"),
    [(lambda: nn.BatchNorm1d(WIDTH), r"the buffer blocks\.1\..*tracked"), (Counting, r"blocks\.1\..*calls")],
)
def test_state_that_a_recomputation_would_change_again_is_refused(kind, inner, name):
    model = kind()
    model.blocks[1] = inner() if kind is ByModule else Around(inner())
    with pytest.raises(evenflow.RecordError, match=f"a gradient checkpoint in the program changes {name}"):
        evenflow.pipeline(model, loss=mean_square, example=regression(), stages=2, num_microbatches=2)


def test_a_frozen_norm_in_a_checkpoint_is_right():
    def frozen():
        model = ByModule()
        model.blocks[1] = nn.BatchNorm1d(WIDTH)
        return model

    def build():
        model = seeded(frozen)()
        model.blocks[1].eval()
        return model

    assert_splits(build, regression(), loss=mean_square)
