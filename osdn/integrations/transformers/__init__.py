"""transformers' own Gated DeltaNet models: by this library's operator, and with its preconditioner.

from osdn.integrations.transformers import accelerate, load_upgraded, upgrade

accelerate()                    # faster on a CPU, until accelerate().restore()
with accelerate():              # or only within the block
    model.generate(...)

model = upgrade(model)          # the same function, with OSDN's preconditioner to train
model.save_pretrained("DIR")
model = load_upgraded("DIR")
"""

from osdn.integrations.transformers.acceleration import accelerate
from osdn.integrations.transformers.upgrading import load_upgraded, upgrade

__all__ = ["accelerate", "load_upgraded", "upgrade"]
