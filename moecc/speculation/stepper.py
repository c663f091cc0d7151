"""Call a transformers model token by token, as its own `generate` does."""

from typing import Any

import torch


class Stepper:
    """A model, and the keyword arguments that grow with the text."""

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        """Go on after a prefill whose arguments were `kwargs`."""
        self._model, self.kwargs = model, kwargs

    def copy(self) -> "Stepper":
        """Give one that can run ahead on the same cache."""
        return Stepper(self._model, dict(self.kwargs))

    def extend(self, count: int) -> None:
        """Let masks and positions cover so many tokens more."""
        grown = self._model._update_model_kwargs_for_generation(
            {}, self.kwargs, num_new_tokens=count
        )
        self.kwargs = grown

    def step(self, ids: torch.Tensor, new: int) -> torch.Tensor:
        """Give the float32 logits [new, V] of the last `new` tokens of `ids` [1, T]."""
        inputs = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, **self.kwargs
        )
        if new > 1 and "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 0  # all: another number would compile another graph
        logits = self._model(**inputs, return_dict=True).logits[0, -new:]
        return logits.to(device=ids.device, dtype=torch.float32, copy=True)
