import os

import torch

# The models of these tests are so small that a second thread costs more than it gives; their processes inherit this
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
