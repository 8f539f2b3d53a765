"""What a run will take, from config.json and the data's manifest alone. Imports no torch."""
