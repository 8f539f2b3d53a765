"""Distributed LoRA fine-tuning of Qwen2-VL. Imports nothing heavy.

Layers; imports point downward only:

4  commands                              parse, build, call
3  training   merge   evaluate   report   download   planning   bench   preflight
                                         none imports another, but bench measures and preflight tries them all
2  data   model   checkpoints   scores   data never imports model: the processor is passed in
1  config   distributed   heartbeat   guard   launched   outcome   jobs   logs   errors   leaving   startup   synthetic

The way of a sample: data.formats -> data.pack -> shards -> data.plan + data.source -> data.stream -> CaptionBatch ->
model.forward -> training.step -> training.checkpoint -> checkpoints.zero -> merge -> evaluate.
"""
