"""What microbatches weigh: the step's loss and gradients are those of the unsplit model over the whole batch.

And bit for bit those of a plain loop over the microbatches with the same weights.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.errors import ConfigError
from evenflow.runtime.recorded.microbatch import Microbatches, split
from unsplit import mean_square, mlp, regression, same, seeded, sgd

ROWS, LENGTH, WORDS = 7, 6, 11
TOLERANCE = 1e-6
MEAN_OVER_ROWS = "mean over items (rows)"


class Words(nn.Module):
    """Scores of the next word; `loss` and `weights` are there for the programs that use them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, WORDS)
        self.register_buffer("weights", torch.linspace(0.5, 2.0, WORDS))
        self.loss = nn.CrossEntropyLoss(weight=torch.linspace(2.0, 0.1, WORDS))

    def forward(self, ids):
        return self.head(self.hidden(self.embed(ids)).tanh())


def words(rows: int = ROWS, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Rows that differ much in how many labels count, some of them with a first label and some without."""
    generator = torch.Generator().manual_seed(rows + length)
    ids = torch.randint(0, WORDS, (rows, length), generator=generator)
    ignored = torch.rand(rows, length, generator=generator) < torch.linspace(0, 0.9, rows)[:, None]
    return {"input_ids": ids, "labels": ids.masked_fill(ignored, -100)}


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=WORDS, **sizes, **heads))


def masked_bert():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=WORDS, tie_word_embeddings=False, **sizes, **quiet)
    )


def own_loss(model, batch):
    return model(**batch).loss


def flat(scores, labels):
    return scores.flatten(0, 1), labels.flatten()


def shifted(model, batch):
    return F.cross_entropy(*flat(model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]))


def smoothed_and_scaled(model, batch):
    scores = flat(model(batch["input_ids"]), batch["labels"])
    return (3 * F.cross_entropy(*scores, label_smoothing=0.1) / 7).float() + 0.01 * model.head.weight.norm()


def own_module(model, batch):
    return model.loss(*flat(model(batch["input_ids"]), batch["labels"]))


def weighted_classes(model, batch):
    return F.cross_entropy(*flat(model(batch["input_ids"]), batch["labels"]), weight=model.weights)


def another_word_is_ignored(model, batch):
    scores = model(batch["input_ids"]).log_softmax(-1)
    return F.nll_loss(scores.transpose(1, 2), batch["input_ids"], ignore_index=3)


def divided_by_a_mask(model, batch):
    scores, labels = flat(model(batch["input_ids"]), batch["labels"])
    mask = (labels != -100).float()
    return (F.cross_entropy(scores, labels, reduction="none") * mask).sum() / mask.sum()


def a_sum_divided_by_a_count(model, batch):
    scores, labels = flat(model(batch["input_ids"]), batch["labels"])
    return F.cross_entropy(scores, labels, reduction="sum") / (labels != -100).sum()


def a_mean_for_each_row(model, batch):
    scores, mask = model(batch["input_ids"]), (batch["labels"] != -100).float()
    losses = F.cross_entropy(scores.transpose(1, 2), batch["labels"], reduction="none")
    return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def probabilities(model, batch):
    wanted = F.one_hot(batch["input_ids"].roll(1, 1), WORDS).float()
    return F.cross_entropy(model(batch["input_ids"]).transpose(1, 2), wanted.transpose(1, 2))


def a_sum(model, batch):
    return F.cross_entropy(*flat(model(batch["input_ids"]), batch["labels"]), reduction="sum")


def two_sums(model, batch):
    scores, labels = flat(model(batch["input_ids"]), batch["labels"])
    return F.cross_entropy(scores, labels, reduction="sum") + 0.1 * scores.square().sum()


def a_plain_sum(model, batch):
    return model(batch["input_ids"]).square().sum()


def scaled_to_a_mean(model, batch):
    wanted = batch["input_ids"].roll(1, 1).flatten()
    found = model(batch["input_ids"]).flatten(0, 1)
    return F.cross_entropy(found, wanted, reduction="sum") / len(wanted)


def two_heads(model, batch):
    scores = model(batch["input_ids"])
    first, second = (F.cross_entropy(scores[:, at], batch["input_ids"][:, -at]) for at in (1, 2))
    return (first + second) / 2


def stacked(model, batch):
    scores = model(batch["input_ids"])
    return torch.stack([F.cross_entropy(*flat(scores, batch["labels"])) for _ in range(2)]).mean()


def by_hand(model, batch):
    """A mean over tokens that no recording gives away."""
    scores, labels = flat(model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:])
    mask = labels != -100
    found = -scores.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.dot(found * mask, torch.ones_like(found) / mask.sum())


def counted_by_hand(batch):
    return (batch["labels"][:, 1:] != -100).sum()


@dataclass(frozen=True)
class Case:
    """A loss, how it is weighed, and by what: a function of a microbatch."""

    loss: Callable
    said: str
    weight: Callable
    build: Callable = Words
    options: dict = field(default_factory=dict)


def labelled(batch):
    return (batch["labels"] != -100).sum()


def num_rows(batch):
    return len(batch["input_ids"])


def label_weights(weights):
    return lambda batch: weights[batch["labels"][batch["labels"] != -100]].sum()


TARGETS = "mean over tokens (targets of its cross-entropy, without -100)"
DIVISOR = "mean over tokens (the sum's divisor)"
SUM = "sum over microbatches"
CASES = {
    "causal": Case(own_loss, TARGETS, counted_by_hand, llama),
    "masked": Case(own_loss, TARGETS, labelled, masked_bert),
    "shifted": Case(shifted, TARGETS, counted_by_hand),
    "smoothed and scaled": Case(smoothed_and_scaled, TARGETS, labelled),
    "own module": Case(own_module, TARGETS, label_weights(torch.linspace(2.0, 0.1, WORDS))),
    "weighted classes": Case(weighted_classes, TARGETS, label_weights(torch.linspace(0.5, 2.0, WORDS))),
    "another is ignored": Case(another_word_is_ignored, TARGETS, lambda b: (b["input_ids"] != 3).sum()),
    "divided by a mask": Case(divided_by_a_mask, DIVISOR, labelled),
    "divided by a count": Case(a_sum_divided_by_a_count, DIVISOR, labelled),
    "a mean for each row": Case(a_mean_for_each_row, MEAN_OVER_ROWS, num_rows),
    "probabilities": Case(probabilities, MEAN_OVER_ROWS, num_rows),
    "two heads": Case(two_heads, TARGETS, num_rows),
    "stacked": Case(stacked, TARGETS, labelled),
    "a sum": Case(a_sum, SUM, lambda _: None),
    "two sums": Case(two_sums, SUM, lambda _: None),
    "a plain sum": Case(a_plain_sum, SUM, lambda _: None, options={"reduction": "sum"}),
    "scaled to a mean": Case(scaled_to_a_mean, MEAN_OVER_ROWS, num_rows),
    "said to be a sum": Case(a_sum, SUM, lambda _: None, options={"reduction": "sum"}),
    "by hand": Case(
        by_hand,
        "mean with the weights that reduction= gives",
        counted_by_hand,
        options={"reduction": counted_by_hand},
    ),
    "said to be over items": Case(
        a_mean_for_each_row, MEAN_OVER_ROWS, num_rows, options={"reduction": "item-mean"}
    ),
    "said to be over tokens": Case(shifted, TARGETS, counted_by_hand, options={"reduction": "token-mean"}),
}


def make(build, loss, example, **options):
    model = seeded(build)()
    options = {"stages": 2, "max_leaf_share": 0.05, "num_microbatches": 3} | options
    return evenflow.pipeline(model, loss=loss, example=example, **options), model


def assert_close(found, expected, name):
    """Within rounding: gradients add up terms that are larger than they are themselves."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=TOLERANCE, msg=lambda text: f"{name}: {text}")


def assert_whole(pipe, model, loss, batch, whole, result=None):
    """The step's loss and gradients are those of `model`, as it is, over the whole batch."""
    found = (pipe.step(batch) if result is None else result).loss
    model.zero_grad()
    gradients = dict(pipe.named_gradients())
    expected = loss(model, whole)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    same(found, expected.detach(), TOLERANCE, "the loss")
    for name, gradient in zip(parameters, wanted, strict=True):
        if gradient is not None:
            assert_close(gradients[name], gradient, name)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_whole_batch_and_of_a_plain_loop_with_these_weights(name):
    case = CASES[name]
    batch = words()
    pipe, _ = make(case.build, case.loss, batch, **case.options)
    assert pipe.reduction == case.said
    assert repr(pipe) == f"Pipeline(2 stages, loss: {case.said})"
    result = pipe.step(batch)
    assert_whole(pipe, seeded(case.build)(), case.loss, batch, batch, result)
    model = seeded(case.build)()
    items = split(batch, 3)
    weights = [case.weight(item) for item in items]
    shares = [1.0 if weight is None else float(weight) / sum(map(float, weights)) for weight in weights]
    parts = []
    for item, share in zip(items, shares, strict=True):
        part = case.loss(model, item)
        part.backward(torch.tensor(share))
        parts.append(part.detach() * share)
    same(result.loss, torch.stack(parts).sum(), 0, "the loss")
    gradients = dict(pipe.named_gradients())
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            same(gradients[key], parameter.grad, 0, key)


@pytest.mark.parametrize("name", ["causal", "shifted", "a mean for each row", "a sum", "divided by a mask"])
def test_evaluation_weighs_alike(name):
    case = CASES[name]
    pipe, _ = make(case.build, case.loss, words())
    model = seeded(case.build)().eval()
    same(pipe.evaluate(words()).loss, case.loss(model, words()).detach(), TOLERANCE, "the loss")


def test_an_integer_class_for_each_row():
    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["labels"])

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (8,), generator=generator)
    labels[:3] = -100
    batch = regression() | {"labels": labels}
    pipe, _ = make(lambda: mlp(4, 8, 3), loss, batch)
    assert_whole(pipe, mlp(4, 8, 3), loss, batch, batch)


# -- microbatches of other lengths


def test_other_lengths_in_each_microbatch():
    items = [words(2, 4), words(3, 9), words(1, 5)]
    pipe, _ = make(Words, shifted, Microbatches(items), num_microbatches=None)
    length = max(item["labels"].shape[1] for item in items)
    whole = {
        name: torch.cat([F.pad(b[name], (0, length - b[name].shape[1]), value=fill) for b in items])
        for name, fill in {"input_ids": 0, "labels": -100}.items()
    }
    assert_whole(pipe, seeded(Words)(), shifted, Microbatches(items), whole)


def test_other_lengths_of_a_mean_over_numbers():
    def loss(model, batch):
        return mean_square(model, batch)

    def flat_loss(model, batches):
        return mean_square(model, {k: torch.cat([b[k].flatten(0, 1) for b in batches]) for k in ("x", "y")})

    def item(rows, length):
        return {k: t.unflatten(0, (rows, length)) for k, t in regression(rows * length).items()}

    items = [item(2, 4), item(3, 9)]
    pipe, _ = make(lambda: mlp(4, 8, 1), loss, Microbatches(items), num_microbatches=None)
    assert_whole(pipe, mlp(4, 8, 1), flat_loss, Microbatches(items), items)


def test_microbatches_without_rows_count_alike():
    items = [{"x": torch.ones(2, 4), "y": torch.ones(1)}, {"x": torch.zeros(6, 4), "y": torch.ones(1)}]

    def loss(model, batch):
        return (model(batch["x"]).sum() - batch["y"].sum()).square()

    pipe, model = make(lambda: mlp(4, 8, 1), loss, Microbatches(items), num_microbatches=None)
    assert pipe.reduction == "mean over microbatches, each counted alike"
    expected = (loss(model, items[0]) * 0.5 + loss(model, items[1]) * 0.5).detach()
    same(pipe.step(Microbatches(items)).loss, expected, 0, "the loss")


# -- nothing to count


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("name", ["causal", "divided by a mask", "by hand"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_microbatch_without_a_label_that_counts_adds_nothing(name, schedule, first):
    case, batch = CASES[name], words(6)
    batch["labels"][first : first + 2] = -100
    pipe, _ = make(case.build, case.loss, batch, schedule=schedule, **case.options)
    assert_whole(pipe, seeded(case.build)(), case.loss, batch, batch)


def test_metrics_leave_out_what_weighs_nothing():
    def loss(model, batch):
        found = shifted(model, batch)
        return found, {"loss": found, "number": 0.5, "rows": len(batch["labels"])}

    batch = words(6)
    batch["labels"][:2] = -100
    pipe, model = make(Words, loss, batch)
    metrics = pipe.step(batch).metrics
    same(metrics["loss"], shifted(model, batch).detach(), TOLERANCE, "the loss as a metric")
    assert (metrics["number"], metrics["rows"]) == (0.5, 6)


def test_a_batch_without_a_label_that_counts_changes_nothing():
    pipe, _ = make(Words, shifted, words(), optimizer=sgd)
    empty = words() | {"labels": torch.full((ROWS, LENGTH), -100)}
    assert pipe.step(empty, update=False).loss.isnan(), "as the unsplit loss is"
    assert_whole(pipe, seeded(Words)(), shifted, words(), words())


# -- the number of items in the whole batch, as Hugging Face's trainer passes it


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_a_number_of_items_makes_the_loss_a_sum(kind):
    batch = words() | {"num_items_in_batch": kind(29)}
    pipe, _ = make(llama, own_loss, batch)
    assert pipe.reduction == SUM
    assert_whole(pipe, seeded(llama)(), own_loss, batch, batch)
    items = Microbatches([item | {"num_items_in_batch": kind(29)} for item in split(words(), 2)])
    assert_whole(pipe, seeded(llama)(), own_loss, items, batch)


def test_another_number_of_items_needs_no_new_recording():
    batch = words(6)
    pipe, model = make(llama, own_loss, batch | {"num_items_in_batch": 29})
    for number in (7, 100):
        loss = pipe.step(batch | {"num_items_in_batch": number}).loss
        whole = own_loss(model, batch | {"num_items_in_batch": number}).detach()
        same(loss, whole, TOLERANCE, "the loss")
    assert len(pipe._parts.recordings.entries) == 1


def test_a_number_of_items_that_the_loss_does_not_use_changes_nothing():
    def loss(model, batch):
        return shifted(model, batch)

    batch = words() | {"num_items_in_batch": 29}
    pipe, _ = make(Words, loss, batch)
    assert pipe.reduction == TARGETS
    assert_whole(pipe, seeded(Words)(), loss, batch, batch)


def test_a_number_of_items_in_a_loss_of_ones_own():
    def loss(model, batch):
        scores, labels = flat(model(batch["input_ids"]), batch["labels"])
        found = F.cross_entropy(scores, labels, reduction="none")
        return found.sum() / batch["num_items_in_batch"]

    batch = words() | {"num_items_in_batch": 29}
    pipe, _ = make(Words, loss, batch)
    assert pipe.reduction == SUM
    assert_whole(pipe, seeded(Words)(), loss, batch, batch)


# -- accumulation


@pytest.mark.parametrize("name", ["causal", "a sum", "a mean for each row", "divided by a mask", "by hand"])
def test_accumulated_steps_are_those_of_one_batch(name):
    case = CASES[name]
    pipe, _ = make(case.build, case.loss, words(), optimizer=sgd, **case.options)
    model = seeded(case.build)()
    batches = [words(5), words(2), words(8)]
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in words()}
    for batch in batches:
        pipe.step(batch, update=False)
    case.loss(model, whole).backward()
    gradients = dict(pipe.named_gradients())
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[key], parameter.grad, key)


def test_accumulated_steps_with_a_number_of_items_are_added_up():
    batches = [b | {"num_items_in_batch": 40} for b in (words(5), words(2))]
    pipe, _ = make(llama, own_loss, batches[0])
    for batch in batches:
        pipe.step(batch, update=False)
    model = seeded(llama)()
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in words()}
    own_loss(model, whole | {"num_items_in_batch": 40}).backward()
    gradients = dict(pipe.named_gradients())
    for key, parameter in model.named_parameters():
        assert_close(gradients[key], parameter.grad, key)


def test_sums_and_means_do_not_accumulate():
    pipe, _ = make(llama, own_loss, words())
    pipe.step(words(), update=False)
    text = (
        "the batches accumulated so far are weighed by tokens and this one by sums, so that their losses "
        "have no common mean; give reduction="
    )
    with pytest.raises(ConfigError, match=text):
        pipe.step(words() | {"num_items_in_batch": 29})
    pipe.step(words())


# -- what cannot be told


def test_two_means_of_other_things_are_warned_of():
    def loss(model, batch):
        scores = model(batch["input_ids"])
        words_loss = F.cross_entropy(*flat(scores, batch["labels"]))
        return words_loss + F.cross_entropy(scores.mean(1), batch["input_ids"][:, 0])

    pipe, model = make(Words, loss, words())
    with pytest.warns(UserWarning, match="^the loss is a sum of means over different numbers of things"):
        found = pipe.step(words()).loss
    parts = [loss(model, item).detach() * (len(item["labels"]) / ROWS) for item in split(words(), 3)]
    same(found, torch.stack(parts).sum(), 0, "the loss")


def test_two_means_of_other_things_that_weigh_alike_are_no_trouble():
    def loss(model, batch):
        scores = model(batch["input_ids"])
        words_loss = F.cross_entropy(*flat(scores, batch["input_ids"]))
        return words_loss + F.cross_entropy(scores.mean(1), batch["input_ids"][:, 0])

    pipe, _ = make(Words, loss, words())
    assert_whole(pipe, seeded(Words)(), loss, words(), words())


def test_branches_that_reduce_in_other_ways_are_warned_of():
    def loss(model, batch):
        scores = flat(model(batch["input_ids"]), batch["labels"])
        if (batch["input_ids"] == 0).all():
            return F.cross_entropy(*scores, reduction="sum")
        return F.cross_entropy(*scores)

    pipe, _ = make(Words, loss, words(6))
    batch = words(6)
    batch["input_ids"][:2] = 0
    said = r"in different ways \(sums and tokens\): they are weighted by rows"
    with pytest.warns(UserWarning, match=said) as warned:
        pipe.step(batch)
    assert warned[0].filename == __file__, "the user's line"


def test_labels_are_counted_where_the_recording_does_not_say():
    with pytest.warns(UserWarning, match="does not show what the loss is a mean over.*give reduction=lambda"):
        pipe, model = make(Words, by_hand, words())
    assert pipe.reduction == "mean over tokens (labels of the batch, without -100)"
    shares = [labelled(item) / labelled(words()) for item in split(words(), 3)]
    parts = [
        by_hand(model, item).detach() * float(share)
        for item, share in zip(split(words(), 3), shares, strict=True)
    ]
    same(pipe.step(words()).loss, torch.stack(parts).sum(), TOLERANCE, "the loss")


def test_labels_without_an_ignored_one_need_no_warning():
    batch = words() | {"labels": words()["input_ids"]}
    pipe, _ = make(Words, by_hand, batch)
    assert_whole(pipe, seeded(Words)(), by_hand, batch, batch)


def test_the_weights_are_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="evenflow"):
        pipe, _ = make(Words, shifted, words())
        pipe.step(words())
    assert [record.getMessage() for record in caplog.records] == [f"the step's loss: {TARGETS}"]


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        (
            "mean",
            r"reduction='mean' \(over rows, or over tokens\?\) is none of 'item-mean', 'token-mean', 'sum'",
        ),
        (3, "reduction=3 is none of"),
        (lambda _: -1, r"reduction= returned -1\.0 for a microbatch; a weight is at least 0 and finite"),
        (lambda _: float("nan"), r"reduction= returned nan"),
        (lambda batch: batch["rows"], r"reduction= failed for a microbatch: KeyError: 'rows'"),
        ("token-mean", "reduction='token-mean': the loss function calls no cross_entropy that averages"),
    ],
)
def test_a_wrong_reduction_is_refused(reduction, message):
    with pytest.raises(ConfigError, match=message):
        make(lambda: mlp(4, 8, 1), mean_square, regression(), reduction=reduction)
