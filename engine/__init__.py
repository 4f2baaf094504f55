"""One model on one device group: architectures, weights, page pool, prefix cache, batch, sampler."""
