"""Counterflow trains, runs, evaluates and plans language models of the DeepSeek-V3 architecture."""
