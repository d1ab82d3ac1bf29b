"""Everyday prose that has nothing to do with any task: what a defense should leave alone (see `utility`).

Written for this package. One subject a passage, two or three sentences each, and nobody in them has a name, so that no
behavior about names is touched.
"""

NEUTRAL = (
    "The kettle had just boiled when the rain began. She poured the water over the leaves, set the timer for four "
    "minutes, and watched the drops run down the window.",
    "Water freezes at zero degrees Celsius and boils at one hundred, as long as the air pressure is that of sea "
    "level. On a high mountain it boils sooner, which is why rice takes longer to cook there.",
    "To repot a plant, choose a container slightly larger than the old one and make sure that it has a hole in the "
    "bottom. Loosen the roots with your fingers, fill the gaps with fresh soil, and water it well.",
    "The last train leaves at a quarter past eleven from platform two. Passengers who miss it can take the night bus, "
    "which stops in front of the post office every forty minutes.",
    "Bees find their way back to the hive by the position of the sun. When one of them discovers a good field of "
    "flowers, it dances on the comb to tell the others how far away it is and in which direction.",
    "A mortgage is a loan that is secured by the house it pays for. If the borrower stops making the monthly "
    "payments, the bank may sell the house in order to get its money back.",
    "The committee approved the budget after two hours of debate. Most of the money will go to repairing the bridge "
    "and to the new swimming pool, and the rest will be kept for emergencies.",
    "In the second half the visitors pressed hard but could not score. A late corner gave the home side its chance, "
    "and the goalkeeper could only watch as the ball went in off the post.",
    "Paper was first made in China, from bark, rags and old fishing nets. It took about a thousand years for the "
    "craft to reach Europe, where mills driven by rivers soon produced it in large amounts.",
    "My grandfather kept his tools on a wooden board above the bench, each one outlined in pencil. If a hammer was "
    "missing, everybody in the house knew about it before dinner.",
    "The heart pumps blood through two circuits. One leads to the lungs, where the blood takes up oxygen, and the "
    "other carries it to the rest of the body and back again.",
    "Add the flour a little at a time and stir until no lumps remain. Cover the bowl with a cloth, leave the dough in "
    "a warm place for an hour, and heat the oven before you shape the loaves.",
    "The old map shows a river where the highway is today. It was led underground when the city grew, and only the "
    "names of a few streets still remind people of it.",
    "A program that sorts a list of names can do so in many ways. Some methods compare every pair and become slow as "
    "the list grows, while others split it in half again and again.",
    "Clouds form when moist air rises and cools. The water in it settles on tiny grains of dust, and once the drops "
    "are heavy enough they fall as rain or, in winter, as snow.",
    "The violin has four strings and is played with a bow of horsehair. Its sound depends on the wood, the varnish "
    "and the shape of the body, and makers have argued about all three for centuries.",
    "Please return the form by the end of the month and keep a copy for yourself. If any of your details have changed "
    "since last year, write the new ones in the box on the second page.",
    "The road climbed through a forest of pines and came out on a bare ridge. From there we could see the whole "
    "valley, with its small white houses and the lake shining at the far end.",
    "Glass is made by melting sand together with soda and lime. While it is hot it can be blown, pressed or drawn "
    "into threads, and it must be cooled slowly so that it does not crack.",
    "The children built a dam across the stream with stones and mud. By the afternoon there was a pool behind it deep "
    "enough to float their wooden boats, and nobody wanted to go home.",
    "Whales are mammals and have to come to the surface to breathe. Some kinds can stay below for more than an hour, "
    "because their muscles store a great deal of oxygen.",
    "When two materials are rubbed together, one of them may take electrons from the other. That is why a balloon "
    "that was rubbed on a sweater sticks to the wall.",
    "The bakery on the corner opens at six and is usually sold out by ten. On Saturdays people line up along the "
    "sidewalk, talk about the weather, and carry their bread home while it is still warm.",
    "A sentence needs a subject and a verb, but not much else. Writers who want to be understood put the most "
    "important word near the end, where the reader pauses for a moment.",
)
