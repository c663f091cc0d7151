"""Measure how far an error of each block of experts reaches, without any text.

An early block's output is most of what the blocks behind it see, and an error of it goes through
all of them; one of the last block's meets a stream that hardly changes. So the same relative error
costs several times as much in one block as in another, and no look at its weights tells.

Text is made up: random tokens, drawn anew twice from what the model says follows them, have about
the routing and sizes of real ones. Copies of a text go through the model together, in each of them
another block's output gets noise, and what that changes in the last hidden state is compared.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import nn

from moecc.runtime.errors import MoeccError, OptionError

_TEXTS, _LENGTH, _REDRAWN = 4, 64, 2
_NOISE = 0.2
"""Of an output's size; with much less, the few choices of experts that turn are all that shows."""


@torch.no_grad()
def measure_sensitivity(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, float]:
    """Give each experts module, by its path, the weight of a relative squared error of its output.

    That is the root of what noise changes: made-up text overstates by two or three times what it
    changes in front against behind. Raises `OptionError` for a model that takes no token ids.
    """
    training = [one for one in model.modules() if one.training]
    try:
        for one in training:
            one.training = False
        language: Any = next(one for one in model.modules() if hasattr(one, "base_model"))
        changes = [_changes(language.base_model, text, blocks) for text in _make_up(language)]
        return dict(zip(blocks, _numbers(torch.stack(changes).mean(0).sqrt()), strict=True))
    except MoeccError:
        raise  # an expert could not be read
    except (StopIteration, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            "sharing bits runs the model on token ids to see where errors reach, and "
            f"{type(model).__name__} does not take them ({type(error).__name__}: {error}); give "
            "a mapping such as {'*.down_proj': 'int8', '*': 'int4'}"
        ) from error
    finally:
        for one in training:
            one.training = True


def _numbers(tensor: torch.Tensor) -> list[float]:
    return cast("list[float]", tensor.tolist())


def _make_up(model: Any) -> torch.Tensor:
    """Give token ids [texts, T]."""
    generator = torch.Generator().manual_seed(0)
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(words, (_TEXTS, _LENGTH), generator=generator)
    for _ in range(_REDRAWN):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
        following = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
        ids[:, 1:] = following.view_as(ids)[:, :-1]
    return ids.to(model.device)


def _changes(model: Any, text: torch.Tensor, blocks: Mapping[str, nn.Module]) -> torch.Tensor:
    """Give what noise in each block changes in the last hidden state: squares, over its own."""
    copies = len(blocks) + 1
    with ExitStack() as hooked:
        for number, block in enumerate(blocks.values(), 1):
            hooked.enter_context(block.register_forward_hook(_disturb(number, copies)))
        last = model(input_ids=text.repeat(copies, 1), use_cache=False).last_hidden_state
    last = last.float().cpu()
    return ((last[1:] - last[0]).square().sum(-1) / last[0].square().sum(-1)).mean(-1)


def _disturb(copy: int, copies: int) -> Callable[..., torch.Tensor]:
    """Make a hook that adds noise to one copy's rows of an output [copies * T, H]."""

    def disturb(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        disturbed = output.clone()
        rows = disturbed.view(copies, -1, output.shape[-1])[copy]
        size = rows.float().square().mean(-1, keepdim=True).sqrt() * _NOISE
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(copy))
        rows += (noise.to(size) * size).to(rows.dtype)
        return disturbed

    return disturb
