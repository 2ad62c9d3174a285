"""A training run at any size, planned on one machine: what each rank holds, computes and sends."""
