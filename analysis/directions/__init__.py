"""What do singular directions read and write, in tokens?"""
