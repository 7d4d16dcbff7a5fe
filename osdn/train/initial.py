"""Initial weights that depend on the seed and the parameters' names, and on nothing else.

A model is built on the meta device, which costs nothing, and given its values module by module:
each module's are drawn on the CPU, by the model's own rules, from a generator seeded by the run's
seed and the module's name. So every process of every run of a recipe begins with the same numbers,
whatever it keeps of them, and a process that keeps a share never holds more than one block whole.
"""

from hashlib import blake2b

import torch
from torch import nn

from osdn.model.configuration import OSDNConfig
from osdn.model.modeling import OSDNForCausalLM


def empty_model(config: OSDNConfig) -> OSDNForCausalLM:
    """The model on the meta device: shapes without values."""
    with torch.device("meta"):
        return OSDNForCausalLM(config)


class Initializer:
    """Gives a meta model its values, part by part.

    Args:
        model: on the meta device.
        seed: of all values.
        device: where they go.
    """

    def __init__(self, model: OSDNForCausalLM, *, seed: int, device: torch.device) -> None:
        self.model, self.seed, self.device = model, seed, device
        # Names are part of every seed.
        self.names = {module: name for name, module in model.named_modules()}
        self._owner: dict[nn.Parameter, nn.Module] = {}  # of a tied one: the first to name it
        for module in self.names:
            for parameter in module.parameters(recurse=False):
                self._owner.setdefault(parameter, module)

    def fill(self, part: nn.Module) -> None:
        """Give every parameter of part that has no value yet one; ties must lie within a part."""
        made: dict[nn.Parameter, nn.Parameter] = {}  # meta -> real; a tied parameter stays one
        for module in reversed(list(part.modules())):  # children first, as transformers does
            drawn = False
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    if parameter not in made:
                        empty = torch.empty_like(parameter, device="cpu")
                        made[parameter] = nn.Parameter(empty, parameter.requires_grad)
                    setattr(module, name, made[parameter])
                    # A tied parameter is drawn once, by the module that named it first.
                    drawn = drawn or self._owner[parameter] is module
            if drawn:
                self._draw(module)
        for parameter in made.values():
            # By .data, so that the Parameter objects that modules hold are the same.
            parameter.data = parameter.data.to(self.device)

    def _draw(self, module: nn.Module) -> None:
        """The model's own rule for the module, special values of its children included."""
        # A hash and not the order of modules: a layer added elsewhere changes no other layer.
        text = f"{self.seed} {self.names[module]}".encode()
        # 63 bits, which manual_seed takes
        seed = int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            torch.manual_seed(seed)
            self.model._init_weights(module)
