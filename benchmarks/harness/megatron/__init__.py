"""GPT-2 and Llama written by hand in Megatron-LM's way: tensor, sequence and pipeline parallelism over plain
torch.distributed."""
