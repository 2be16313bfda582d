"""Where does the change of a score come from: stopping, format, or the rest?"""
