"""Words of the tasks for a real model, written by us from general knowledge.

Pairs are "input answer"; commas separate the entries.
"""

ANTONYM = """
hot cold, big small, tall short, fast slow, happy sad, young old, heavy light, dark light,
rich poor, hard soft, wet dry, clean dirty, full empty, open closed, early late, high low,
loud quiet, strong weak, thick thin, wide narrow, deep shallow, sweet sour, smooth rough,
sharp dull, true false, left right, good bad, better worse, best worst, first last, more less,
most least, many few, always never, everything nothing, everybody nobody, everywhere nowhere,
inside outside, above below, over under, up down, front back, top bottom, north south, east west,
near far, here there, before after, in out, on off, yes no, day night, morning evening,
summer winter, sunrise sunset, dawn dusk, black white, male female, love hate, war peace,
friend enemy, hero villain, heaven hell, life death, alive dead, beginning end, start stop,
success failure, victory defeat, win lose, profit loss, buy sell, borrow lend, give take,
push pull, come go, arrival departure, enter exit, rise fall, raise lower, increase decrease,
expand contract, add subtract, multiply divide, question answer, teach learn, laugh cry,
smile frown, remember forget, accept reject, attack defend, build destroy, save spend, find lose,
float sink, freeze melt, appear disappear, agree disagree, connect disconnect, lock unlock,
pack unpack, tie untie, dress undress, able unable, lucky unlucky, fair unfair, safe dangerous,
known unknown, usual unusual, certain uncertain, visible invisible, possible impossible,
perfect imperfect, patient impatient, mature immature, moral immoral, legal illegal,
regular irregular, responsible irresponsible, honest dishonest, loyal disloyal,
complete incomplete, active passive, direct indirect, dependent independent, formal informal,
sane insane, accurate inaccurate, ancient modern, permanent temporary, public private,
simple complex, easy difficult, cheap expensive, careful careless, useful useless,
hopeful hopeless, harmful harmless, painful painless, guilty innocent, natural artificial,
real fake, absent present, positive negative, optimist pessimist, maximum minimum, major minor,
majority minority, senior junior, superior inferior, internal external, interior exterior,
import export, include exclude, encourage discourage, plus minus, odd even, vertical horizontal,
solid liquid, raw cooked, asleep awake, tight loose, bright dim, rare common, guest host,
parent child, teacher student, winner loser, employer employee, predator prey, ceiling floor,
past future, ancestor descendant, upstairs downstairs, forward backward, quickly slowly,
together apart, with without, both neither, supply demand, wealth poverty, knowledge ignorance
"""

# Nouns and their plurals where adding -s or -es, or -ies for -y, would be wrong, ...
PLURAL = """
man men, woman women, child children, foot feet, tooth teeth, goose geese, mouse mice, ox oxen,
person people, louse lice, knife knives, wife wives, life lives, leaf leaves, wolf wolves,
shelf shelves, half halves, calf calves, loaf loaves, thief thieves, elf elves, sheep sheep,
deer deer, species species, series series, aircraft aircraft, moose moose, salmon salmon,
potato potatoes, tomato tomatoes, hero heroes, echo echoes, crisis crises, basis bases,
thesis theses, analysis analyses, oasis oases, hypothesis hypotheses, diagnosis diagnoses,
phenomenon phenomena, criterion criteria, bacterium bacteria, stimulus stimuli, nucleus nuclei,
alumnus alumni, larva larvae, policeman policemen, grandchild grandchildren, quiz quizzes,
housewife housewives, snowman snowmen, fisherman fishermen, parenthesis parentheses,
emphasis emphases, midwife midwives, jackknife jackknives, bookshelf bookshelves
"""
# ... and nouns that follow these rules.
NOUNS = """
roof, chief, belief, cliff, piano, photo, radio, video, studio, kangaroo, bus, box, church, dish,
brush, fox, glass, class, watch, match, beach, bench, peach, witch, wish, bush, dress, boss, tax,
virus, address, branch, sandwich, lunch, inch, eyelash, crash, city, baby, lady, story, party,
country, family, fly, cherry, puppy, body, army, enemy, factory, diary, library, hobby, copy, spy,
butterfly, memory, battery, activity, company, duty, university, century, boy, key, day, toy,
monkey, donkey, valley, turkey, ray, journey, chimney, essay, cat, book, table, chair, garden,
river, window, engine, bridge, orange, horse, house, nose, rose, face, place, page, village,
mirror, camera, doctor, ticket, planet, cloud, mountain, idea, banana, taxi, zebra, umbrella
"""

# Verbs and their past tenses where the rules of spelling would be wrong, ...
PAST = """
go went, see saw, eat ate, drink drank, run ran, sing sang, swim swam, begin began, ring rang,
sink sank, write wrote, drive drove, ride rode, rise rose, speak spoke, break broke, steal stole,
choose chose, freeze froze, give gave, take took, shake shook, fall fell, know knew, grow grew,
throw threw, blow blew, fly flew, draw drew, buy bought, bring brought, think thought,
fight fought, catch caught, teach taught, seek sought, sleep slept, keep kept, sweep swept,
feel felt, leave left, lose lost, meet met, feed fed, lead led, hear heard, tell told, sell sold,
hold held, stand stood, understand understood, find found, sit sat, get got, forget forgot,
win won, spin spun, swing swung, cling clung, sting stung, dig dug, stick stuck, strike struck,
shoot shot, make made, pay paid, say said, lay laid, build built, send sent, spend spent,
bend bent, lend lent, come came, become became, have had, do did, put put, cut cut, hit hit,
shut shut, set set, cost cost, hurt hurt, spread spread, bite bit, hide hid, slide slid,
swear swore, wear wore, tear tore, weave wove, creep crept, weep wept, deal dealt, mean meant,
forgive forgave, withdraw withdrew
"""
# ... verbs that double their last letter, and verbs that follow the rules.
DOUBLED_VERBS = """
stop, plan, drop, hop, clap, hug, beg, grab, rob, nod, slip, shop, chat, trap, admit, prefer,
permit, occur, regret
"""
VERBS = """
walk, talk, jump, play, clean, cook, visit, ask, help, start, open, paint, wait, rain, dance,
bake, smile, arrive, love, hope, save, close, move, invite, cry, study, carry, marry, hurry, try,
worry, copy, reply, bury, apply, deny, laugh, watch, wash, finish, follow, enjoy, climb,
land, sail, knock, mix
"""

COMPARATIVE = "good better, bad worse, many more, little less"
DOUBLED_ADJECTIVES = "big, hot, thin, fat, wet, sad, red, slim, fit, dim"
ADJECTIVES = """
tall, short, fast, slow, old, young, long, small, high, low, cold, warm, cool, hard, soft, strong,
weak, rich, poor, dark, bright, loud, sharp, smooth, thick, sweet, sour, fresh, new, near, deep,
steep, clean, cheap, kind, proud, quick, great, light, mild, rough, tight, smart, calm, neat,
large, nice, wide, late, safe, brave, strange, rude, wise, fine, loose, pale, rare, ripe, close,
happy, easy, heavy, busy, early, angry, dirty, dry, pretty, funny, noisy, lucky, hungry, thirsty,
lazy, tiny, ugly, healthy, sunny, windy, cloudy, crazy, messy, spicy, shiny, greedy, sleepy,
juicy, salty, tasty, dusty, rainy, foggy, muddy
"""
LONG_ADJECTIVES = """
beautiful, expensive, important, difficult, interesting, dangerous, comfortable, careful, useful,
famous, popular, modern, serious, boring, exciting, tired, patient, generous, powerful, successful,
intelligent, delicious, colorful, nervous, honest, confident, creative, curious, delicate,
elegant, fragile, grateful, helpful, impressive, jealous, reliable, romantic, sensitive, suitable,
talented, terrible, valuable, wonderful, ambitious, anxious, convenient, efficient, flexible,
horrible, mysterious, accurate, attractive,
convincing, detailed, dramatic, durable, fashionable, fortunate, logical, practical, productive,
realistic, rewarding, surprising, thoughtful, transparent, vulnerable
"""

# Countries by continent. Those on two continents, or whose status is disputed, are left out.
COUNTRIES = {
    "Africa": """
Algeria, Angola, Botswana, Burkina Faso, Cameroon, Chad, Cape Verde, Djibouti, Equatorial Guinea,
Eritrea, Ethiopia, Gabon, Ghana, Guinea, Kenya, Lesotho, Liberia, Libya, Madagascar, Malawi, Mali,
Mauritania, Mauritius, Morocco, Mozambique, Namibia, Niger, Nigeria, Rwanda, Senegal, Sierra
Leone, Somalia, Sudan, South Sudan, Gambia, Togo, Tunisia, Uganda, Zambia, Zimbabwe, Comoros,
Seychelles""",
    "Asia": """
Afghanistan, Bahrain, Bangladesh, Bhutan, Cambodia, China, India, Iran, Iraq, Japan, Jordan,
Kuwait, Kyrgyzstan, Laos, Lebanon, Malaysia, Maldives, Mongolia, Myanmar, Nepal, North Korea,
Oman, Pakistan, Philippines, Qatar, Saudi Arabia, Singapore, South Korea, Syria, Tajikistan,
Thailand, Turkmenistan, United Arab Emirates, Uzbekistan, Vietnam, Yemen, Brunei""",
    "Europe": """
Albania, Andorra, Austria, Belarus, Belgium, Bosnia and Herzegovina, Bulgaria, Croatia, Czech
Republic, Denmark, Estonia, Finland, France, Germany, Greece, Hungary, Iceland, Ireland, Italy,
Latvia, Liechtenstein, Lithuania, Luxembourg, Malta, Moldova, Monaco, Montenegro, North Macedonia,
Norway, Poland, Portugal, Romania, Serbia, Slovakia, Slovenia, Spain, Sweden, Switzerland,
Ukraine, United Kingdom, Netherlands, San Marino""",
    "North America": """
Bahamas, Barbados, Belize, Canada, Costa Rica, Cuba, Dominican Republic, El Salvador, Guatemala,
Haiti, Honduras, Jamaica, Mexico, Nicaragua, Panama, Grenada, Dominica, Saint Lucia, Antigua and
Barbuda""",
    "South America": """
Argentina, Brazil, Chile, Colombia, Ecuador, Guyana, Paraguay, Peru, Suriname, Uruguay,
Venezuela""",
    "Oceania": """
Australia, Fiji, New Zealand, Papua New Guinea, Samoa, Solomon Islands, Tonga, Vanuatu, Kiribati,
Palau, Tuvalu"""}

KINDS = {
    "animal": """
lion, tiger, elephant, giraffe, rabbit, squirrel, eagle, sparrow, penguin, dolphin, whale, shark,
frog, lizard, crocodile, spider, beetle, hedgehog, otter, badger, leopard, camel, goat, hyena,
ostrich, walrus, lynx, weasel""",
    "plant": """
oak, pine tree, rose, tulip, daisy, fern, moss, ivy, cactus, willow, birch, orchid, sunflower,
lavender, clover, bamboo, maple tree, dandelion, violet, jasmine, juniper, nettle, heather,
hawthorn, lily, magnolia, holly, poplar""",
    "food": """
bread, cheese, butter, pancake, noodles, sausage, yogurt, soup, omelette, pizza, chocolate,
biscuit, porridge, lasagna, muffin, pudding, ham, salad, sandwich, jam, spaghetti, hamburger,
waffle, risotto, custard, curry, cake, popcorn""",
    "tool": """
hammer, screwdriver, saw, wrench, pliers, chisel, shovel, rake, axe, spade, hoe, crowbar, sickle,
tweezers, spanner, trowel, pickaxe, sledgehammer, mallet, pitchfork, power drill, scissors,
soldering iron, hacksaw, wheelbarrow, sandpaper, spirit level, tape measure""",
    "clothing": """
shirt, trousers, skirt, sweater, jacket, scarf, glove, sock, coat, blouse, jeans, pajamas, hat,
cardigan, vest, shorts, raincoat, stockings, hoodie, kimono, tuxedo, leggings, underpants, mitten,
bathrobe, apron, swimsuit, beret""",
    "vehicle": """
car, truck, bus, train, bicycle, motorcycle, tram, taxi, helicopter, airplane, ferry, canoe,
yacht, submarine, scooter, van, ambulance, tractor, rowboat, limousine, sailboat, minibus,
fire engine, kayak, hovercraft, caravan, jeep, tricycle"""}

WORD_CLASSES = {
    "noun": """
furniture, happiness, kitchen, river, teacher, bakery, freedom, bicycle, hospital, mountain,
child, sister, museum, honesty, candle, village, opinion, accident, knowledge, luggage, pencil,
donkey, sky, cathedral, employee, childhood, laziness, bedroom, citizen, violin, army, diamond,
guitar, island, jewel, kingdom, lawyer, medicine, oxygen, poet, recipe, scientist, theory,
uncle, vegetable, wisdom, youth, zebra, ability, bravery, furnace, library, poverty, kindness""",
    "verb": """
arrive, explain, forget, describe, believe, eat, listen, obey, bring, choose, decide, enjoy,
destroy, behave, persuade, sing, admit, borrow, carry, deny, earn, forgive, gather, hesitate,
imagine, know, learn, marry, arise, occur, prefer, receive, speak, teach, understand, vanish,
write, annoy, become, consist, deserve, encourage, follow, allow, happen, improve, lose, maintain,
persist, remember, suggest, forbid, inherit, wander""",
    "adjective": """
enormous, happy, beautiful, careful, dangerous, tiny, lazy, angry, clever, famous, hungry,
polite, wooden, foolish, generous, friendly, honest, jealous, lonely, modest, nervous, obvious,
popular, rich, sad, terrible, useful, valuable, weak, young, stubborn, clumsy, curious, delicious,
expensive, fragile, gentle, heavy, invisible, large, sunny, eager, old, painful, rare, sleepy,
tall, ugly, wealthy, wise, cheerful, poor, healthy, nice"""}

THINGS = """
The hotel by the lake; This blender; My new phone; The second season of the show;
Our guide on the boat tour; The evening class; That little restaurant; The museum of glass;
This umbrella; The repair service; The audio book; My trip to the islands; The wedding cake;
The concert in the park; This vacuum cleaner; The train ride; His latest novel; The camp site;
The fish soup; This office chair; The language course; The guest room; The city walk;
Her first film; The spa; The garden hose; The dentist; This backpack; The school play; The buffet
"""
POSITIVE = """
exceeded all my hopes; was worth every cent; left me smiling; made my whole week;
could hardly have been better; was a pleasure from start to finish; won me over at once;
is the best I have come across in years; deserves every star; was even better than described;
was nothing short of superb; kept every promise; is not bad at all; never once disappointed me;
left nothing to be desired; was a lovely surprise; is something I would recommend to anyone;
put everyone in a good mood; turned out to be wonderful; is a real treat; beat everything else
we tried; has no flaw that I could find; is simply brilliant; was charming in every way; was as
good as everyone says; did not let us down; made me want to come back; was great value;
is hard to fault; gave us a day to remember fondly; was pure joy; is a gem; impressed even my
grumpy uncle; was a delight; was far better than I had feared; is perfect for what I need;
earned my full trust; was excellent; was splendid; makes life easier every single day
"""
NEGATIVE = """
fell short of all my hopes; was a waste of money; left me angry; ruined my whole week;
could hardly have been worse; was a disappointment from start to finish; lost me within minutes;
is the worst I have come across in years; does not deserve a single star; was nothing like the
description; was nothing short of awful; broke every promise; is not good at all; let me down
again and again; left a lot to be desired; was a nasty surprise; is something I would not wish on
anyone; put everyone in a bad mood; turned out to be dreadful; is a real nuisance; was worse than
everything else we tried; has more flaws than I can count; is simply hopeless; was unpleasant in
every way; was not as good as everyone says; did not impress us; made me want my money back;
was far too expensive for what it is; is hard to like; gave us a day we would rather forget;
was pure misery; is a joke; annoyed even my patient aunt; was a mess; was even worse than I had
feared; is useless for what I need; lost all my trust; was terrible; was dull; makes life harder
every single day
"""
