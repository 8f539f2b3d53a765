"""How good captions are: BLEU, METEOR, ROUGE-L and CIDEr, as the field computes them."""
