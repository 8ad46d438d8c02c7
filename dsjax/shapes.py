"""The letters of dsjax's shapes, once for every room.

b batch · t time (tokens of a sequence) · T tokens of a batch, flattened · m rows of a matmul
d model width · h heads · n nope part of a query/key (128) · r RoPE part (64) · v value (128)
q = n + r · c latent (512) · w = c + r width of the cache (576) · f hidden width of an MLP
e routed experts · k experts a token is sent to (top-k) · g groups · l layers · p vocabulary

A trailing suffix on a name spells its shape: `x_TD` is [tokens, width], `load_E` is [experts].
"""
