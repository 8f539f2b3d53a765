"""Distributed LoRA fine-tuning of Qwen2-VL. Imports nothing heavy.

Layers; imports point downward only:

4  commands                              parse, build, call
3  training   merge   evaluate   report   bench   planning   none of them imports another
2  data   model   checkpoints   scores   data never imports model: the processor is passed in
1  config   distributed   heartbeat   guard   launched   outcome   jobs   logs   errors   startup   synthetic

The way of a sample: data.formats -> data.pack -> shards -> data.plan + data.source -> data.stream -> CaptionBatch ->
model.forward -> training.step -> training.checkpoint -> checkpoints.zero -> merge -> evaluate.
"""
