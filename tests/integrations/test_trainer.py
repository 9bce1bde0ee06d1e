"""The Hugging Face Trainer, and what its models take and return: dicts with labels, outputs with losses and caches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import Dataset

from backmatch import BackMatchSGD
from backmatch.probe import Inputs, squared_response_gradients
from tests.integrations.cases import SETTINGS, assert_same, run_example, tensors

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test-integrations")
pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed: make test-integrations")

STEPS = 14


class Tokens(Dataset[dict[str, Tensor]]):
    """Random sequences of 12 tokens; labels are the tokens, of which the first three count not, or one class of three."""

    def __init__(self, classes: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, 20, (64, 12), generator=generator)
        ignored = torch.cat([torch.full((64, 3), -100), self.tokens[:, 3:]], 1)
        self.labels = self.tokens.sum(1) % 3 if classes else ignored

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def gpt2(dropout: float = 0.0) -> nn.Module:
    """Tied embeddings, and a cache that is returned in training too."""
    torch.manual_seed(0)
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"vocab_size": 20, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drops, use_cache=True)).train()


def bert() -> nn.Module:
    """A classifier of Linear, LayerNorm and Embedding layers alone; hidden states are returned too."""
    torch.manual_seed(0)
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(
        vocab_size=20, max_position_embeddings=12, type_vocab_size=1, num_labels=3, output_hidden_states=True, **sizes, **drops
    )
    return transformers.BertForSequenceClassification(config).train()


def trainer_of(folder: Path, model: nn.Module, *, optimizers: Any = (None, None), cls_and_kwargs: Any = None, **arguments: Any) -> Any:
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **usual | quiet | arguments),
        train_dataset=Tokens(classes=not isinstance(model, transformers.GPT2LMHeadModel)),
        optimizers=optimizers,
        optimizer_cls_and_kwargs=cls_and_kwargs,
    )


def optimizer_of(trainer: Any) -> BackMatchSGD:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, BackMatchSGD)
    return optimizer


class Recorded:
    """The arguments of every training forward of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        self.handle = model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        self.calls.append(dict(kwargs))


def train_with_trainer(folder: Path, model: nn.Module, **arguments: Any) -> tuple[BackMatchSGD, list[dict[str, Any]]]:
    """The optimizer after training, and what every training forward was called with."""
    settings = SETTINGS | arguments.pop("settings", {})
    recorded = Recorded(model)
    trainer = trainer_of(folder, model, optimizers=(BackMatchSGD(model, **settings), None), **arguments)
    # The probe's forwards come between the steps'.
    taken: list[dict[str, Any]] = []
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        recorded.calls.clear()
        loss = step(*args, **kwargs)
        (call,) = recorded.calls
        taken.append(call)
        return loss

    trainer.training_step = training_step
    trainer.train()
    recorded.handle.remove()
    return optimizer_of(trainer), taken


def plain(model: nn.Module, calls: list[dict[str, Any]], *, accumulate: int = 1, clip: float = 0.0, **settings: Any) -> BackMatchSGD:
    optimizer = BackMatchSGD(model, **SETTINGS | settings)
    for index, call in enumerate(calls):
        model(**call).loss.backward()
        if (index + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(("make", "estimator"), [(gpt2, "gradient"), (gpt2, "probe"), (bert, "probe"), (bert, "loss")])
def test_trainer_is_the_plain_loop(make: Any, estimator: str, tmp_path: Path) -> None:
    run, calls = train_with_trainer(tmp_path, make(), settings={"estimator": estimator})
    assert len(calls) == STEPS
    assert all("labels" in call for call in calls)
    assert_same(run, plain(make(), calls, estimator=estimator))


def test_accumulation_and_clipping_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    run, calls = train_with_trainer(tmp_path, gpt2(), gradient_accumulation_steps=2, max_grad_norm=0.1, max_steps=6)
    assert len(calls) == 12
    assert run.param_groups[0]["step"] == 6
    assert_same(run, plain(gpt2(), calls, accumulate=2, clip=0.1))


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    run, calls = train_with_trainer(tmp_path, gpt2(), activation_checkpointing=True)
    assert_same(run, plain(gpt2(), calls))


def test_the_three_ways_of_passing_the_optimizer_are_one(tmp_path: Path) -> None:
    class Factory:
        def __call__(self, model: nn.Module, **settings: Any) -> BackMatchSGD:
            return BackMatchSGD(model, **settings)

    def run(model: nn.Module, **how: Any) -> BackMatchSGD:
        trainer = trainer_of(tmp_path, model, **how)
        trainer.train()
        return optimizer_of(trainer)

    model = gpt2()
    given = run(model, optimizers=(BackMatchSGD(model, **SETTINGS), None))
    model = gpt2()
    assert_same(run(model, cls_and_kwargs=(BackMatchSGD, {"model": model} | SETTINGS)), given)
    assert_same(run(gpt2(), cls_and_kwargs=(Factory, SETTINGS)), given)
    assert given.paces().keys() == dict(model.named_parameters()).keys()


def test_without_a_model_in_the_arguments_every_pace_is_one(tmp_path: Path) -> None:
    """Trainer then hands over parameters alone, in two groups by weight decay."""
    trainer = trainer_of(tmp_path, gpt2(), cls_and_kwargs=(BackMatchSGD, SETTINGS))
    trainer.train()
    assert len(optimizer_of(trainer).param_groups) == 2
    assert {float(pace) for pace in optimizer_of(trainer).paces().values()} == {1.0}


@pytest.mark.parametrize("stop", [8, 9])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    """At a measurement and between two, with dropout: Trainer keeps the random state."""

    def run(folder: str, resume: Path | None = None) -> BackMatchSGD:
        model = gpt2(dropout=0.1)
        saves = {"save_strategy": "steps", "save_steps": stop}
        trainer = trainer_of(tmp_path / folder, model, optimizers=(BackMatchSGD(model, **SETTINGS), None), seed=3, **saves)
        if resume is not None:
            nn.init.zeros_(model.transformer.h[0].mlp.c_fc.weight)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        assert trainer.state.global_step == STEPS
        return optimizer_of(trainer)

    whole = run("whole")
    assert_same(run("resumed", tmp_path / "whole" / f"checkpoint-{stop}"), whole)


@pytest.mark.parametrize(("make", "estimator"), [(gpt2, "probe"), (bert, "probe"), (bert, "loss")])
def test_models_are_measured_on_their_logits_alone(make: Any, estimator: str) -> None:
    """As if forward returned nothing else: neither losses nor hidden states nor caches count."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids).logits

    data = Tokens(classes=make is bert)
    ids, labels = data.tokens[:8], data.labels[:8]
    full, bare = make(), Logits()
    optimizers = [BackMatchSGD(net, estimator=estimator, samples=4) for net in (full, bare)]
    output = full(input_ids=ids, labels=labels)
    assert set(output) > {"loss", "logits"}
    output.loss.backward()
    loss = full.loss_function
    logits = bare(ids)
    (loss(logits, labels, vocab_size=20) if make is gpt2 else nn.functional.cross_entropy(logits, labels)).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_same(*optimizers)


def test_the_response_of_a_language_model_is_its_mean_square_jacobian_per_token() -> None:
    """``E[u²]/N`` of equation 5, here for a layer of GPT-2 by the Jacobian of its logits; N counts tokens."""
    model = gpt2().double()
    ids = Tokens().tokens[:2]
    parameter = model.transformer.h[1].mlp.c_proj.bias
    logits = model(input_ids=ids).logits
    rows = [torch.autograd.grad(z, parameter, retain_graph=True)[0] for z in logits.flatten()]
    expected = torch.stack(rows).square().sum(0).mean() / ids.numel()
    inputs = Inputs((), {"input_ids": ids, "labels": ids})
    name = "transformer.h.1.mlp.c_proj.bias"
    draws = torch.stack([squared_response_gradients(model, inputs, seed=seed)[name].mean() for seed in range(100)])
    assert_close(draws.mean(), expected, rtol=4 * (draws.std() / draws.mean() / 10).item(), atol=0.0)


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
def test_conv1d_is_a_linear_layer_stored_the_other_way_round(estimator: str) -> None:
    """``transformers.pytorch_utils.Conv1D`` keeps ``[d_in, d_out]``, so its units are columns.

    With steps that are not held: of a square matrix the singular vectors of one side are followed, which is the other side here.
    """
    conv, linear = gpt2().double(), gpt2().double()
    flipped = {f"{name}.weight": module for name, module in linear.named_modules() if isinstance(module, transformers.pytorch_utils.Conv1D)}
    for name, module in flipped.items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        layer = nn.Linear(module.nx, module.nf, dtype=torch.float64)
        layer.load_state_dict({"weight": module.weight.detach().T, "bias": module.bias.detach()})
        setattr(linear.get_submodule(parent), child, layer)
    assert len(flipped) == 8
    settings = SETTINGS | {"estimator": estimator, "max_stretch": math.inf}
    data, optimizers = Tokens(), [BackMatchSGD(net, **settings) for net in (conv, linear)]
    for _ in range(3):
        for net, optimizer in zip((conv, linear), optimizers, strict=True):
            optimizer.zero_grad()
            net(input_ids=data.tokens[:8], labels=data.labels[:8]).loss.backward()
            optimizer.step()
    for read in (BackMatchSGD.responses, BackMatchSGD.paces):
        values, expected = (read(optimizer) for optimizer in optimizers)
        for name, value in values.items():
            assert_close(
                value.mT if name in flipped else value, expected[name], rtol=1e-9, atol=0.0, msg=lambda text, n=name: f"{n}: {text}"
            )
    weights = dict(linear.named_parameters())
    for name, value in conv.named_parameters():
        assert_close(value.mT if name in flipped else value, weights[name], rtol=1e-9, atol=1e-12)


def test_estimators_that_know_no_conv1d_say_so() -> None:
    with pytest.raises(NotImplementedError, match=r"transformer\.h\.0\.attn\.c_attn.*Conv1D.*estimator='probe'"):
        BackMatchSGD(gpt2(), estimator="loss")


def test_tied_weights_are_one_tensor() -> None:
    optimizer = BackMatchSGD(gpt2())
    assert len(tensors(optimizer)) == len({id(p) for p in tensors(optimizer)})
    assert "lm_head.weight" not in {name for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.timeout(300)
def test_the_example_runs() -> None:
    assert "nats per character" in run_example("trainer_gpt2.py")
