"""Handwritten digits, two new classes at a time, in scikit-learn; then some rows are forgotten.

pip install 'lifelong[sklearn]'
python examples/integrations/sklearn_stream.py
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from lifelong.integrations.sklearn import LifelongClassifier


def main(memory: int = 200) -> list[float]:
    """Accuracy on all ten digits after each pair."""
    X, y = load_digits(return_X_y=True)
    X = X / 16.0  # in a stream nobody knows the later rows' scale
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, random_state=0, stratify=y)

    classifier = LifelongClassifier(memory=memory, random_state=0)
    accuracy = []
    for pair in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)):
        rows = np.isin(y, pair)
        classifier.partial_fit(X[rows], y[rows])  # no earlier row, no list of the classes to come
        accuracy.append(classifier.score(X_test, y_test))
        print(f"after {classifier.n_seen_:5} rows: {accuracy[-1]:.3f} of all digits are right")
    at_once = LogisticRegression(max_iter=1000).fit(X, y).score(X_test, y_test)
    print(f"logistic regression on all rows at once: {at_once:.3f}")

    remembered = classifier.prior_.memory.origin[:20]
    classifier.forget(ids=remembered.numpy())  # as they were numbered when they came
    print(f"after 20 rows were forgotten: {classifier.score(X_test, y_test):.3f}")
    return accuracy


if __name__ == "__main__":
    main()
