"""The logit lens: what the residual stream would say if the model ended at a layer."""
