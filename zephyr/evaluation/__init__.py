"""What a trained model is worth: MT-Bench, AlpacaEval, the Open LLM Leaderboard, preference accuracy."""
