"""Words and instructions of the built-in word tasks: six seen and three held-out texts per task."""

from qlora_jax.data.text import records

_NOUNS = """
  actor album alarm anchor angle ankle apple apron arrow artist aunt author badge bag ball balloon
  banana band bank barn barrel basket bath battery beach bead beam bean bear beard bed bee bell belt
  bench bicycle bill bird blanket blister block boat bone book boot border bottle bowl box boy
  bracelet brain branch bread brick bridge broom brother brush bucket buckle bug bus bush butcher
  button cabin cable cake camel camera camp canal candle cannon canoe car card carpet carrot cart
  castle cat cave ceiling cell chain chair cherry chest chicken chin church circle circus city class
  clinic clock cloud clown coach coat coin collar comet cook cookie corner cottage cough country
  cousin cow crab cradle crane crayon cross crow crown crystal cup curtain cushion dancer daughter
  desert desk diary dinner dish doctor dog doll dollar donkey door dragon drawer dream dress drum
  duck eagle ear editor egg elbow engine eraser evening eye face factory fairy family farm farmer
  feather fence field finger fire flag flame flower flute forest fork fox friend frog fruit galaxy
  garden gate giant gift giraffe girl glass glove goat grape guest guitar hall hammer hand harbor
  hat hawk heart helmet hen hill hinge hole hook horn horse hospital hotel hour house insect island
  jacket jar jewel judge jug juice jungle kettle key king kitchen kite kitten ladder lady lake lamp
  lantern lawn lawyer leg lemon lesson letter library light lion lip list lizard lock lunch machine
  magnet map marble market mask match meadow medal melon mirror monkey month moon morning motor
  mountain museum nail neck necklace needle nephew nest net nose note nurse oar ocean office onion
  orange orchard oven owl page paint palace pan panda paper parade parent park parrot party path
  peach peanut pear pen pencil penny pepper piano picnic picture pig pillow pilot pipe pirate pizza
  planet plant plate pocket poem poet pony pool porch pot prince prize puddle pump puppet puppy
  purse puzzle queen rabbit radio rain ranch rat ring river road robe robot rocket roof room root
  rope rose ruler saddle sail salad sandal sandwich saucer school seat seed shadow shark
  ship shirt shoe shop shoulder shower sister skirt sky sled snail snake soldier song spider spoon
  spot spring square squirrel stable stamp star station stick stone store storm story stove straw
  street student summer swing sword table tail tailor teacher temple tent throne thumb ticket tiger
  tile toad toe tongue tool tower town toy tractor train tray treasure tree truck trumpet tulip
  turkey turtle uncle valley vase vest village violin voice wagon wall wallet watch wave whale wheel
  whistle window wing winter witch wizard worker worm wrist yard zebra
"""
NOUNS = tuple(_NOUNS.split())

IRREGULAR_PLURALS = {
  "child": "children",
  "foot": "feet",
  "goose": "geese",
  "knife": "knives",
  "leaf": "leaves",
  "life": "lives",
  "loaf": "loaves",
  "man": "men",
  "mouse": "mice",
  "ox": "oxen",
  "person": "people",
  "shelf": "shelves",
  "thief": "thieves",
  "tooth": "teeth",
  "wife": "wives",
  "wolf": "wolves",
  "woman": "women",
  "potato": "potatoes",
  "tomato": "tomatoes",
  "hero": "heroes",
}


def _wordings(*texts: str) -> records.Wordings:
  return records.Wordings(texts[:-3], texts[-3:])


WORDINGS: dict[str, records.Wordings] = {
  "first_letter": _wordings(
    "Write the first letter of the word.",
    "Which letter does the word begin with?",
    "Give the initial letter of this word.",
    "Output only the letter at the start of the word.",
    "Extract the first character of the given word.",
    "Name the letter that comes first in the word.",
    "What is the opening letter of the word?",
    "Tell me the letter that the word starts with.",
    "Return the leading character of the input.",
  ),
  "second_letter": _wordings(
    "Write the second letter of the word.",
    "Which letter comes second in the word?",
    "Give letter number two of this word.",
    "Output only the letter after the first one.",
    "Extract the second character of the given word.",
    "Name the letter in second position.",
    "What letter directly follows the initial one?",
    "Tell me the character at place two of the word.",
    "Return the word's letter no. 2.",
  ),
  "last_letter": _wordings(
    "Write the last letter of the word.",
    "Which letter does the word end with?",
    "Give the final letter of this word.",
    "Output only the letter at the end of the word.",
    "Extract the last character of the given word.",
    "Name the letter that closes the word.",
    "What is the word's ending letter?",
    "Tell me the letter that the word finishes with.",
    "Return the trailing character of the input.",
  ),
  "reverse_word": _wordings(
    "Write the word backwards.",
    "Reverse the word.",
    "Spell the word from its end to its start.",
    "Give the letters of the word in reverse order.",
    "Turn the word around, last letter first.",
    "Output the mirror image of the word.",
    "Flip the order of the characters in this word.",
    "How does the word read from right to left?",
    "Return the input with its letters reversed.",
  ),
  "plural": _wordings(
    "Write the plural of the word.",
    "Give the plural form of this noun.",
    "Turn the singular noun into a plural.",
    "What do you call more than one of these?",
    "Pluralize the word.",
    "Convert the word from singular to plural.",
    "How do you say it when there are several of them?",
    "Write the word as you would after the word 'many'.",
    "Return the noun in the plural.",
  ),
  "uppercase": _wordings(
    "Write the word in capital letters.",
    "Turn every letter of the word into a capital.",
    "Convert the word to upper case.",
    "Give the word in uppercase.",
    "Capitalize all letters of this word.",
    "Repeat the word in block capitals.",
    "Type the word as if the caps lock key were on.",
    "Shout the word: all of it in big letters.",
    "Return the input with all characters uppercased.",
  ),
  "count_letters": _wordings(
    "How many letters does the word have?",
    "Count the letters of the word.",
    "Write the number of letters in this word.",
    "Give the length of the word.",
    "Out of how many characters is the word made?",
    "State how long the word is in letters.",
    "What is the letter count of the input?",
    "Tell me the word's number of characters.",
    "Return the size of the word, counted in letters.",
  ),
  "spell": _wordings(
    "Spell the word with spaces between its letters.",
    "Write the letters of the word one by one.",
    "Separate the letters of this word by spaces.",
    "List every letter of the word in order.",
    "Break the word up into single letters.",
    "Write the word with a gap after each letter.",
    "Take the word apart into its characters.",
    "Say the word letter by letter.",
    "Return the input's characters, spaced out.",
  ),
  "number_to_words": _wordings(
    "Write the number in words.",
    "Spell the number out in English.",
    "How do you read this number aloud?",
    "Give the number without using digits.",
    "Turn the digits into words.",
    "Write the numeral as it is spoken.",
    "Express the figure verbally.",
    "What is this number called in English?",
    "Return the number as text.",
  ),
  "next_number": _wordings(
    "Write the number that comes next.",
    "Add one to the number.",
    "Which number follows this one?",
    "Count one further.",
    "Increase the number by one.",
    "Give the successor of this number.",
    "What do you get after one more?",
    "Name the integer right after the given one.",
    "Return the number plus one.",
  ),
  "words_to_number": _wordings(
    "Write the number in digits.",
    "Turn the words into a number.",
    "Give the numeral for this number word.",
    "Convert the spelled-out number to figures.",
    "Which number is meant? Use digits.",
    "Write the number words as a numeral.",
    "Put the spoken number into digits.",
    "What does the number look like in figures?",
    "Return the numeric form of the text.",
  ),
  "sum": _wordings(
    "Add the two numbers.",
    "Write the sum of the numbers.",
    "What do the two numbers make together?",
    "Give the total of both numbers.",
    "Sum up the numbers.",
    "Work out the first number plus the second.",
    "How much is it when both are put together?",
    "Calculate the result of the addition.",
    "Return the numbers' total.",
  ),
  "difference": _wordings(
    "Write the difference of the two numbers.",
    "Subtract the smaller number from the larger one.",
    "How far apart are the two numbers?",
    "Take the lesser number away from the greater.",
    "Give the distance between both numbers.",
    "By how much does one number exceed the other?",
    "What must be added to the smaller to reach the larger?",
    "Calculate the gap between the numbers.",
    "Return the result of the subtraction, as a positive number.",
  ),
  "larger_number": _wordings(
    "Write the larger of the two numbers.",
    "Which number is bigger?",
    "Give the greater number.",
    "Choose the higher of both numbers.",
    "Output the maximum.",
    "Which of the two is worth more?",
    "Pick the number that is the greatest.",
    "Tell me which one is the largest.",
    "Return the bigger one of the pair.",
  ),
  "sort_words": _wordings(
    "Sort the words alphabetically.",
    "Put the words in alphabetical order.",
    "Write the words as a dictionary would order them.",
    "Arrange the words from A to Z.",
    "Order the words by their letters.",
    "List the words in the order of the alphabet.",
    "Bring the words into lexicographic order.",
    "Alphabetize this list.",
    "Return the words, sorted.",
  ),
  "second_word": _wordings(
    "Write the second word of the list.",
    "Which word comes second?",
    "Give word number two.",
    "Output only the word after the first one.",
    "Extract the second word.",
    "Name the word in second position.",
    "What word directly follows the opening one?",
    "Tell me the item at place two.",
    "Return the list's word no. 2.",
  ),
  "last_word": _wordings(
    "Write the last word of the list.",
    "Which word comes at the end?",
    "Give the final word.",
    "Output only the word that no other follows.",
    "Extract the last word.",
    "Name the word that closes the list.",
    "With what word does the list finish?",
    "Tell me the concluding item.",
    "Return the rightmost word.",
  ),
  "count_words": _wordings(
    "How many words are there?",
    "Count the words.",
    "Write the number of words in the list.",
    "Give the length of the list in words.",
    "Of how many words does the list consist?",
    "State how many words are listed.",
    "What is the word count of the input?",
    "Tell me the number of items.",
    "Return the size of the list.",
  ),
}
