"""Generated material for the demo and the tests: captioned pictures, and bases of random weights."""
