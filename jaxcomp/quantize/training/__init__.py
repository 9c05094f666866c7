"""Methods that quantize while a network trains, inside the user's own train step."""
