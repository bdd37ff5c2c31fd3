"""What a trained model is worth: programs that pass, bits per byte, where its experts look, scores by other tools."""
