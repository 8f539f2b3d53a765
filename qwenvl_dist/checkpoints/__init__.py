"""What a training run leaves behind: manifests, partitions, reading and writing them."""
