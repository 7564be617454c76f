"""What train.py and validate.py are made of: options, data, recipe, loop, state."""
