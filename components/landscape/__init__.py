"""The safety landscape: how safe a model stays as its weights move (VISAGE, https://arxiv.org/abs/2405.17374)."""
