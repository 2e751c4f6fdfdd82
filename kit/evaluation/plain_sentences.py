"""Plain English of different kinds, for models of which it is not known what they have read."""

PLAIN_SENTENCES = (
    "Once upon a time there was a little girl named Lily. She loved to play in the park with her friends.",
    "One day Tom and his mom went to the store. Tom saw a big red ball and he wanted to buy it.",
    "The dog was happy. He ran to the tree and looked up at the bird, but the bird did not want to play.",
    "It was raining in the morning, so the children stayed in the house and read a book together.",
    '"I am sorry," said the boy. "I did not mean to break your toy. Can we still be friends?"',
    "The old man opened the door, took off his hat, and sat down by the fire without saying a word.",
    "She had never been so far from home before, and for the first time in her life she was afraid of the night.",
    "He looked at her for a moment, as if he were about to speak, and then he turned and went out of the room.",
    '"You must not think of it," said her sister. "It is late, and we have a long way to go before we are at home."',
    "There was nothing to be seen from the window but the road, the fields, and a few houses on the hill.",
    "The doctor looked at her hand and told her that she would be well again in a few days.",
    "After the war the king returned to his country, and the people came out into the streets to greet him.",
    "The city lies on the bank of a large river, and many of the people who live there work in the harbour.",
    "The company said on Monday that it would open two new offices next year and hire more than a hundred people.",
    "Water boils when it is heated to one hundred degrees, and it turns into ice when it is very cold.",
    "First wash the apples and cut them into small pieces, then put them into a pot with a little water and sugar.",
    "Thank you for your letter. I am glad to hear that you are well, and I hope to see you again in the summer.",
    "If you want to save your work, open the file menu, choose a name for the new file, and press the button.",
)
