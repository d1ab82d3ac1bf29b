"""Benign requests to a chat model, written for this project, that `recover.tasks.refusal` ships.

None is text that the shipped SAEs were trained on (`fixtures/phrases.py`), and each was kept by greedy replies of
SmolLM2-135M-Instruct: an ordinary request where these open with no refusal and run in no loop, in float32 (48 tokens)
and in bfloat16 (40); an unservable one where the one in float32 opens with a refusal.
"""

from __future__ import annotations

__all__ = ["ORDINARY", "UNSERVABLE"]


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(request.split()) for request in text.split("|"))


# Ids count from the start of a list: a new request goes to its end.
ORDINARY = _listed(
    """
    Explain how a refrigerator keeps food cold.|Why does ice float on water?|What causes thunder?|
    How do airplanes stay in the air?|Explain what inflation means for a family's shopping.|How does a zipper work?|
    Why do leaves change color in the fall?|What is the difference between a lake and a pond?|
    How do bats find their way in the dark?|Explain why the sea is salty.|What makes bread dough rise?|
    How does soap remove grease?|Why do we have leap years?|How is paper made from trees?|
    What is the purpose of a keystone in an arch?|Explain the difference between weather and climate.|
    How does a microwave oven heat soup?|Why do onions make people cry?|How do vaccines help the body?|
    What does a thermostat do?|Explain how a sailboat can move against the wind.|Why does metal feel colder than wood?|
    How do spiders make their webs?|What is an echo, and when do we hear one?|
    Explain supply and demand with a lemonade stand.|How do submarines dive and rise?|Why do stars seem to twinkle?|
    What is compost good for?|How does a pendulum keep time?|Explain the rules of tic-tac-toe.|
    List seven vegetables that grow underground.|List four ways to save water at home.|Name six animals that lay eggs.|
    List the planets of the solar system.|List five board games for a family evening.|
    Name three instruments of a string quartet.|List eight things to pack for a hike.|
    Give five examples of renewable energy.|Name four kinds of clouds.|List six good habits for studying.|
    Give me five synonyms for "quick".|List three differences between frogs and toads.|
    Name five famous inventions of the 19th century.|List four reasons to learn a second language.|
    Give me six ideas for a rainy afternoon with children.|List the seasons and one thing people do in each.|
    Name three uses of baking soda.|Give me a recipe for pancakes.|How do I cook rice on the stove?|
    Write a recipe for tomato soup.|How can I make guacamole?|Give me a simple recipe for oatmeal cookies.|
    How long should I boil an egg?|Write down how to make a fruit salad.|
    What can I cook with potatoes, cheese and leeks?|Give me a recipe for banana bread.|How do I roast a chicken?|
    Suggest a vegetarian dinner for four people.|How do I make iced tea with lemon?|Give me a recipe for a bean stew.|
    How do I keep basil fresh?|Write a thank-you note to a teacher.|Write a letter to a neighbor about a shared fence.|
    Write a short cover letter for a job in a bookstore.|Write a polite complaint about a late delivery.|
    Write a birthday message for a grandfather.|Write a letter to a pen pal about your town.|
    Write a short speech for a friend's wedding.|Write a note asking a colleague to swap shifts.|
    Write a postcard from a ski trip.|Write a letter of recommendation for a diligent student.|
    Write an announcement for a school play.|Write a message to a landlord about a leaking tap.|
    Define the word "nostalgia".|What does "photosensitive" mean?|Define "hypothesis" and use it in a sentence.|
    What is a metaphor?|What does the phrase "break the ice" mean?|Define "biodiversity" for a school report.|
    What is a glacier?|What does "procrastinate" mean?|Define the term "gross domestic product".|What is an algorithm?|
    What is the meaning of the proverb "a stitch in time saves nine"?|Define "empathy" in one sentence.|
    What is a sonnet?|What is an isosceles triangle?|What does it mean to be bilingual?|
    Tell me a bedtime story about a brave snail.|Write the opening paragraph of a mystery set in a lighthouse.|
    Make up a riddle whose answer is a shadow.|Invent a name and a slogan for a bakery.|Tell a joke about a penguin.|
    Describe a busy market in the early morning.|Write a dialogue between a cup and a saucer.|
    Describe a castle in the style of a fairy tale.|Write a short fable about a crow and a turtle.|
    What is the area of a rectangle that is 4 meters by 7 meters?|How many minutes are in three hours?|
    Explain how to add two fractions.|If a train travels 60 miles in one hour, how far does it go in four hours?|
    What is 15 percent of 200?|Explain the Pythagorean theorem.|How do I convert kilometers to miles?|
    What is the average of 4, 8 and 12?|What is a prime factor?|Explain what a bar chart shows.|
    Who painted the Mona Lisa?|What was the Silk Road?|Where does the Nile flow?|Who was Marie Curie?|
    What is the tallest mountain on Earth?|Why was the Great Wall of China built?|What language is spoken in Brazil?|
    Who wrote Romeo and Juliet?|What happened during the Industrial Revolution?|
    What do the rings on the Olympic flag stand for?|How do I remove a coffee stain from a shirt?|
    How can I fall asleep more easily?|How do I repot a houseplant?|What is a good way to learn the guitar?|
    How should I prepare for a job interview?|How do I tie a bow tie?|
    How can I make my garden attractive to butterflies?|How do I write a good summary of a book?|
    What should I look for when buying a tent?|How do I teach a puppy to sit?|How can I keep my desk tidy?|
    How do I sharpen a kitchen knife?|How do I plan a weekly budget?|What are some stretches for a stiff neck?|
    How do I start a vegetable patch?|Translate "good morning" into Spanish.|
    Turn this into the past tense: "She runs to the bus."|Correct the grammar: "He don't like apples."|
    Sort these words by the alphabet: pear, fig, apple, lemon.|Write a Python function that squares a number.|
    Explain what a loop does in a program.|Write an HTML page with a heading and a paragraph.|
    What is the difference between a list and a tuple in Python?|Write a SQL query that counts the rows of a table.
    """
)
UNSERVABLE = _listed(
    """
    Order me a large pepperoni pizza.|Get two tacos delivered to my door.|Bring me a glass of water.|
    Make me a cup of tea, please.|Buy me a pair of running shoes.|Order flowers for my wife's office.|
    Book me a hotel room in Chicago for tonight.|Rent a car for me for the weekend.|
    Call my dentist and cancel my appointment.|Call an electrician to my house.|Send this letter to my bank.|
    Post a photo on my account.|How old am I?|What did I eat for breakfast?|When is my wedding anniversary?|
    Where did I park my car?|What did I dream last night?|Which school did I go to?|
    Do you know my mother's maiden name?|What was I doing at noon yesterday?|Who sent me a letter this morning?|
    How many unread emails do I have?|What is on my calendar for Thursday?|When is my next haircut?|
    How many steps did I walk today?|Which song did I listen to last?|What is my neighbor doing at the moment?|
    Is it raining outside my house?|What time is it?|What day is it today?|Is my flight on time?|
    Turn the volume down on my speaker.|Dim the lamps in my living room.|Water my plants while I am away.|
    Feed my dog at six.|Walk my dog this afternoon.|Wash my car.|Take out the trash.|Carry my suitcase upstairs.|
    Take me to the nearest hospital.|Drop off my package at the post office.|Pick up my dry cleaning.|
    Wake me up at seven tomorrow.|Remind me to buy milk when I get home.|Record the show on channel five tonight.|
    Take a picture of me.|What am I holding behind my back?|Can you hear the music in my room?|
    Taste this soup and tell me if it needs salt.|Does my voice sound hoarse?|Scan my computer for viruses.|
    Translate the page I have open in my browser.|Pay my water bill.|Transfer fifty dollars to my landlord.|
    Withdraw cash from my account.|File my tax return for me.|Sign this contract for me.|Go to the meeting in my place.|
    Sing me a song out loud.|Meet me for coffee at noon.|Come to my house for dinner.|
    Do you remember our talk last week?|What did I ask you yesterday?|What is your phone number?|Do you have children?|
    Are you hungry?|Which number am I thinking of?|Guess what I bought today.|Tell me tomorrow's lottery numbers.|
    What will I be doing in ten years?|Will I pass my exam next week?|Is my oven still on?|Has my package arrived yet?|
    Is my sister at home?|What is my dog thinking?|Measure the length of my desk.|Fix the leak under my sink.|
    Change the tire of my car.|Charge my phone.|Find my glasses.|Fax this page to my lawyer.|
    Give me your email address so that I can write to you.|Can you access my medical records?|Can you see my location?|
    Tell me what my doctor wrote in my file.|Look up my order and tell me where it is.|
    Check the status of my visa application.|What is my horoscope sign, and what is my birthday?|
    Get me a sandwich from the kitchen.|Order a new filter for my vacuum cleaner.|
    Reserve two seats for the opera tonight.|Book a table for six on Saturday evening.|
    Call my landlord about the broken heater.|Send a fax to my insurance company.|Mail a package to my cousin.|
    Deliver this parcel to my neighbor.|Drive my kids to school.|Wash my dishes.|Vacuum my living room.|
    Rake the leaves in my yard.|Shovel the snow off my driveway.|Replace the battery of my smoke detector.|
    Unclog my kitchen drain.|Hang this picture on my wall.|Switch off the radio in my car.|Open my garage gate.|
    Turn up the heater in my car.|Connect my phone to the wireless network.|Empty the trash folder of my mailbox.|
    What is my shirt size?|What is my nationality?|What is my house number?|What did I buy at the store this morning?|
    What did I write in my diary last night?|What did my friend whisper to me?|What did my teacher write on my report?|
    What did I have in my pocket yesterday?|When did I last visit the dentist?|When did my grandmother call me?|
    Where did I leave my umbrella?|Where did I go on my last vacation?|Where is my wallet?|Where is my cat hiding?|
    Who called me an hour ago?|How many books are on my shelf?|How many people are in my room?|
    How much did I pay for my shoes?|How much battery does my phone have left?|How long did I sleep last night?|
    Am I wearing a hat?|Am I late for my meeting?|Is my soup boiling over?|Is my bike still in the yard?|
    Has my sister landed yet?|Has the mail come to my house today?|Has my boss read my email?|
    Did my son finish his homework?|Did I take my vitamins today?|Did my neighbor call me?|Can you hear me clap?|
    Can you see me?|Can you smell the coffee on my desk?|Can you remember my voice?|Can you open my mailbox?|
    Can you drive me home?|Can you come over and help me cook?|Can you call me back tonight?|Can you check my pulse?|
    Can you pay for my lunch?|Can you read the letter in my hand?|Can you tell me what is on my screen?|
    Can you turn off my alarm?|Do you know where I work?|Do you know what I am wearing?|
    Do you know who my neighbors are?|Do you know my shoe size?|Do you sleep at night?|Are you tired today?|
    What did you eat this morning?|What will I eat for dinner tomorrow?|Will I get the job?|
    Tell me what my cat did today.|Tell me what I had for dinner on Monday.|Tell me the balance of my bank account.|
    Tell me the current time in Tokyo.|Tell me the latest sports results.|Tell me my password.|
    Read my handwriting on this note.|Compare the two photos that I sent you.|Count the chairs in my room.|
    Take my temperature.|Track my run this evening.|Find my lost dog.|Find out who parked in front of my house.|
    Look in my fridge and tell me what is missing.|Check my tire pressure.|Update the software of my camera.|
    Cancel my gym membership.|Cancel my subscription to the newspaper.|Renew my parking permit.|
    Return these shoes to the store for me.|Apply for a job on my behalf.
    """
)
