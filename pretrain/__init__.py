"""Training of hybrid language models: ``python -m pretrain CONFIG``."""

import os
import warnings

# What the libraries warn each other about; nothing that a user of ours could act on.
for message in (
    ".*Transformer Engine and Apex are not installed.*",
    ".*Apex is not installed. Falling back to Torch Norm.*",
    ".*full scope is deprecated. Use empty cuda_graph_scope.*",
    ".*The .grad attribute of a Tensor that is not a leaf.*",
    ".*torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor|_all_gather_base|"
    "_reduce_scatter_base)` is deprecated.*",
    ".*`load_state_dict` is deprecated and will be removed.*",
):
    warnings.filterwarnings("ignore", message=message)

# Libraries draw progress bars of fractions of a second between the lines of a log.
os.environ.setdefault("TQDM_DISABLE", "1")
