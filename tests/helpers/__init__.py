"""What several test files need: random models, results made up by hand, a browser, Hugging Face's side."""
