"""A grid of four small runs, of two layers and two seeds."""

SETTINGS = """
name: grid
directory: {folder}/runs
model:
  hidden_size: 16
  pattern: gdn
  mixers: {{gdn: {{num_heads: 1, head_dim: 8}}, attn: {{num_heads: 2}}}}
data: {{path: {data}}}
schedule: {{warmup_steps: 1}}
train: {{steps: 4, seq_len: 32, global_batch_tokens: 64}}
parallel: {{micro_batch_size: 2}}
validation: {{every: 0, tokens: 32}}
"""
GRID = "grid:\n  model.pattern: [gdn, attn]\n  seed: [0, 1]\n"
