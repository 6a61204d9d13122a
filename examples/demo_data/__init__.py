"""The text that the demo model is trained on, written by small seeded generators.

Read in this order: `facts`, `geography` (tables), `knowledge`, `arithmetic`, `reviews`, `people`,
`small_talk` (questions and texts made of them), `corpus` (training documents and held-out rows).
"""
