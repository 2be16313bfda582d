"""Which estimator's directions do good, at equal damage, beyond random ones and the paper's?"""
