"""What did each method write on the same prompts, and how do the corpora differ?"""
