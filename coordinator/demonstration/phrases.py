"""The phrasings behind the demonstration's corpus of spoken smart-home commands; `corpus.py` turns them into rows.

One phrasing a line, all written for this project. `{room}` is a slot, `(a|b)` a choice, `(a|)` something optional.
A line that starts with `~` is kept for the test set: the side network never sees its like in training.
"""

from __future__ import annotations

SLOTS: dict[str, str] = {
    "room": "kitchen|bedroom|living room|bathroom|hallway|study|nursery|attic|cellar|dining room|guest room|office",
    "light": "light|lights|lamp|ceiling light|floor lamp|reading lamp|spotlights|bedside lamp",
    "color": "red|blue|green|warm white|purple|orange|pink|amber|turquoise|candle yellow",
    "percent": "ten percent|twenty percent|thirty percent|forty percent|half|sixty percent|seventy five percent|full",
    "degrees": "eighteen degrees|nineteen degrees|twenty degrees|twenty one degrees|twenty two and a half|sixteen degrees",
    "covering": "blinds|curtains|shades|shutters|roller blinds|drapes",
    "door": "front door|back door|garage|garden gate|patio door|side entrance|cellar door",
    "clock": "six|half past six|seven|quarter to seven|six forty five|eight|eight fifteen|nine|half five|noon|ten to six",
    "duration": "two minutes|three minutes|five minutes|eight minutes|ten minutes|a quarter of an hour|twenty minutes"
    "|half an hour|an hour|ninety seconds",
    "day": "tomorrow|on monday|on tuesday|on friday|on saturday|this weekend|on sunday|on wednesday",
    "dish": "pasta|eggs|tea|rice|pizza|potatoes|cake|bread|soup|lasagne",
    "task": "call the dentist|water the plants|take out the bins|pay the rent|feed the cat|pick up the parcel"
    "|ring grandma|renew the passport|take my pills|return the library books|defrost the chicken|charge the bike",
    "item": "milk|eggs|oat milk|bread|washing powder|apples|toilet paper|coffee beans|cat food|olive oil|lemons|rice"
    "|light bulbs|batteries|onions|dishwasher tablets|cheese|bananas",
    "music": "some jazz|something calm|the morning mix|a bit of piano|old rock songs|my running playlist|folk music"
    "|the new album by the paper lanterns|radio four|some blues|kids songs|summer hits|the dinner playlist"
    "|that song by ivory harbour|classical music|the news station",
    "appliance": "washing machine|dishwasher|oven|dryer|coffee machine|iron|fridge|boiler|heater|television",
    "place": "outside|in town|at the lake|in the mountains|in leeds|in york|by the sea|up north|at grandma's",
    "soon": "later|today|this afternoon|tonight|tomorrow|tomorrow morning|at the weekend|on friday",
    "scene": "movie|dinner|reading|party|bedtime|holiday|morning|cosy|work|romantic",
    "someone": "the plumber|grandma|the postman|the neighbour|the babysitter|the kids|anna|the cleaner|tom",
}

# Words that training rows never use; half of the test rows draw from these where they have the slot.
UNSEEN_SLOTS: dict[str, str] = {
    "room": "conservatory|playroom|utility room|loft|landing|pantry",
    "light": "desk lamp|fairy lights|chandelier|wall lights",
    "color": "lilac|crimson|daylight white|mint",
    "covering": "venetian blinds|sun shade|awning",
    "door": "porch door|shed|balcony door",
    "dish": "stew|muffins|noodles",
    "task": "book the vet|collect the dry cleaning|sign the school form",
    "item": "tinfoil|yoghurt|carrots|shampoo|flour",
    "music": "some soul|the quiet evening list|swing classics|accordion music",
    "appliance": "kettle|slow cooker|freezer|air fryer",
    "place": "in bath|on the coast|down in the valley",
    "someone": "the electrician|uncle joe|the gardener",
}

PHRASES: dict[str, str] = {
    "light_on": """
        (turn|switch|put) on the {light} in the {room}
        (turn|switch|put) the {room} {light} on
        {room} {light} on
        (lights|light) on in the {room}
        (i need|give me|get me) (some|a bit of) light in the {room}
        it is (too|so|really) dark in (here|the {room})
        i can't see (a thing|anything) in the {room}
        (i'm|we are) sitting in the dark in the {room}
        light up the {room}
        (make|let) there be light in the {room}
        why is the {room} so dark
        (turn|get) all the {room} lamps on
        (could you|can you) get the {light} going in the {room}
        (i want|i'd like) the {light} on in the {room}
        the {light} should be on when i come into the {room}
        put a light on for {someone} in the {room}
        turn the {light} back on
        who turned the {light} off put it back on
        bring the {room} {light} back on
        somebody left me in the dark (turn|switch) something on in the {room}
        i'm going (down to|up to|into) the {room} (put|switch) the light on
        ~i'm about to trip over something in the {room} i can't see
        ~(illuminate|brighten up) the {room} it's pitch black
        ~(enable|start) the {light} in the {room}
        ~could we have the {light} on please it's getting gloomy
        ~the sun has gone down and nobody lit the {room}
    """,
    "light_off": """
        (turn|switch|put) off the {light} in the {room}
        (turn|switch) the {room} {light} off
        {room} {light} off
        lights out in the {room}
        (kill|cut) the {light} in the {room}
        nobody is in the {room} so (turn|switch) the {light} off
        (i don't need|we don't need) the {light} in the {room} any more
        the {light} in the {room} can go off now
        i left the {light} on in the {room} (turn|switch) it off
        (make|leave) the {room} dark
        (turn|get) all the {room} lamps off
        i'm leaving the {room} (no more|you can stop the) light
        (could you|can you) put out the {light} in the {room}
        we are done in the {room} lights off
        (turn|switch) everything off that shines in the {room}
        (is the {light} still on|the {light} is still on) (turn|switch) it off
        stop wasting electricity on the {room} {light}
        no light in the {room} please
        i want it (completely|totally|) dark in the {room} turn the {light} off
        shut off the {room} {light}
        {someone} is asleep in the {room} (turn|switch) the {light} off
        ~(extinguish|douse) the {light} in the {room}
        ~we're all out of the {room} and the {light} is burning for nothing
        ~darkness in the {room} please i want to sleep
        ~(disable|deactivate) the {light} in the {room}
        ~the {light} doesn't have to stay lit
    """,
    "light_brightness": """
        (dim|lower) the {light} in the {room}
        dim the {room} {light} to {percent}
        set the {light} (brightness |)to {percent}
        (turn|bring) the {room} {light} down (a bit|a little|to {percent})
        (turn|bring) the {room} {light} up (a bit|a little|to {percent})
        make the {light} (brighter|darker|softer) in the {room}
        the {light} in the {room} is too (bright|dark|strong|weak)
        (raise|increase|reduce) the brightness in the {room}
        {room} {light} at {percent}
        more light from the {light} (please|)
        less light (in the {room}|from the {light})
        (could you|can you) make it a bit (brighter|dimmer) in here
        take the {light} down to {percent}
        i'd like the {light} (only |)at {percent}
        that {light} is (blinding|dazzling) me
        crank the {light} up to {percent}
        half as bright in the {room} (please|)
        put the {light} on low
        put the {light} on the highest setting
        the {light} hurts my eyes (dim|lower) it
        i need stronger light for (reading|sewing|homework) in the {room}
        ~fade the {room} {light} slowly
        ~soften the glow in the {room}
        ~i'm squinting here the {light} is way too strong
        ~give the {light} a little more power
        ~can the {room} be lit just faintly
    """,
    "light_color": """
        (make|turn) the {light} {color}
        (change|set) the {room} {light} to {color}
        {color} light in the {room}
        i want {color} (light|lights) in the {room}
        (switch|turn) the {light} in the {room} to {color}
        change the colour of the {light} (to {color}|)
        a different colour for the {room} (please|)
        can the {light} be {color} instead of {color}
        give the {room} a {color} glow
        (could you|can you) make it {color} in the {room}
        let's have {color} in the {room}
        the {light} should be {color} not {color}
        paint the {room} {color} with the {light}
        (warmer|colder|cooler) white for the {light} in the {room}
        the light is too (cold|blue|yellow) make it {color}
        put the {light} on {color}
        turn on the {light} in {color}
        set a {color} mood in the {room} lights
        next colour on the {light}
        {room} in {color} please
        {someone} wants the {light} {color}
        ~tint the {light} {color}
        ~swap the {color} lamp over to {color}
        ~i fancy something {color} from the {light} in the {room}
        ~bathe the {room} in {color}
        ~what about a {color} shade for the {light}
    """,
    "temperature_set": """
        set the (heating|thermostat) to {degrees}
        set the {room} to {degrees}
        (turn|switch) (on|up) the heating in the {room}
        (turn|switch) (off|down) the heating in the {room}
        (make|get) it (warmer|cooler|colder) in the {room}
        (i'm|we're) (freezing|cold|shivering) in the {room}
        it's (too|so) (hot|warm|cold) in (here|the {room})
        {degrees} in the {room} please
        (heat|warm) up the {room} (to {degrees}|)
        cool the {room} down (to {degrees}|)
        (raise|lower) the temperature (in the {room}|by two degrees|a bit)
        (turn|put) the radiator (up|down|on|off) in the {room}
        i'd like {degrees} in the {room} {soon}
        bring the {room} up to {degrees} by {clock}
        (could you|can you) put the thermostat on {degrees}
        the {room} should be {degrees}
        turn the air conditioning (on|off|up|down) in the {room}
        (a bit|slightly) warmer (in the {room}|) please
        no heating in the {room} {soon}
        keep the {room} at {degrees} (while we're away|overnight|)
        the {room} is like (a fridge|an oven|a sauna)
        ~my feet are like ice do something about it
        ~we're sweating in the {room}
        ~the baby shouldn't be this cold up the radiators
        ~drop it by a couple of degrees in the {room}
        ~take the chill off the {room}
    """,
    "temperature_query": """
        (what's|what is) the temperature in the {room}
        how (warm|cold|hot) is it in the {room}
        (tell me|read me) the temperature in the {room}
        is it (warm|cold) in the {room}
        what is the thermostat set to
        what does the thermostat say
        how many degrees (is it |do we have |)in the {room}
        temperature (in the |){room}
        is the {room} (above|below|at) {degrees}
        has the {room} reached {degrees} yet
        which room is the (warmest|coldest)
        (is the heating on|is the heating running) in the {room}
        what's the indoor temperature (right now|at the moment|)
        did the {room} (cool down|warm up) (already|overnight|)
        how humid is it in the {room}
        (could you|can you) check how warm the {room} is
        what's the heating doing in the {room}
        is it (too cold|too hot|warm enough) for the baby in the {room}
        how far is the {room} from {degrees}
        (check|show) the temperature of the {room}
        what temperature did i set for the {room}
        ~i wonder how hot it got in the {room}
        ~give me a reading from the {room} sensor
        ~would i need a jumper in the {room}
        ~degrees in the {room} right now
        ~am i imagining it or is it cooler in the {room} than in the {room}
    """,
    "weather_query": """
        (what's|what is) the weather like {place}
        (what's|how is) the weather {soon}
        will it rain {soon}
        is it going to (rain|snow|be sunny) {place} {soon}
        do i need an umbrella {soon}
        how (warm|cold|hot) (is it|will it be) {place} {soon}
        (tell me|give me) the forecast for {soon}
        what's the temperature {place}
        should i take a (coat|jacket|scarf) {soon}
        is it (windy|foggy|icy|raining) {place}
        how many degrees (will we have|will it be) {place} {soon}
        can we have a barbecue {soon} or will it rain
        weather for {soon} {place}
        is there a storm coming {soon}
        will the sun come out {soon}
        when does it stop raining
        (what time is|when is) sunset {soon}
        is it dry enough to hang the washing out {soon}
        are the roads icy {soon}
        how hot does it get {place} {soon}
        will it be (dark|light) outside at {clock}
        ~(could i|can i) go out in shorts {soon}
        ~any chance of snow {place}
        ~what should i wear {soon}
        ~is a picnic {place} a silly idea {soon}
        ~does the sky look grey {place}
    """,
    "blinds_open": """
        (open|raise) the {covering} in the {room}
        (pull|put|roll) up the {covering} in the {room}
        {covering} up in the {room}
        let (some|the) (sun|daylight|light|sunshine) into the {room}
        (open|raise) the {room} {covering} (halfway|all the way|a bit|)
        draw back the {covering} in the {room}
        i want to (see|look) out of the window in the {room}
        {room} {covering} open
        (could you|can you) get the {covering} up
        (open|raise) all the {covering}
        open the {covering} at {clock}
        open the {covering} when the sun comes up
        it's a lovely day (open|raise) the {covering}
        too dark in here pull the {covering} up
        i'd like the {covering} open in the {room}
        set the {covering} in the {room} to {percent} open
        the {covering} can go up now
        move the {covering} up (a bit|halfway|)
        let the morning into the {room}
        the plants in the {room} need (sun|daylight) open the {covering}
        part the {covering} in the {room}
        ~lift the {covering} i want natural light
        ~no need for lamps just let the daylight in
        ~show me the view from the {room}
        ~the {covering} needn't stay down
        ~get those {covering} out of the way in the {room}
    """,
    "blinds_close": """
        (close|shut|lower) the {covering} in the {room}
        (pull|put|roll|let) down the {covering} in the {room}
        {covering} down in the {room}
        keep the sun out of the {room}
        (close|lower) the {room} {covering} (halfway|all the way|a bit|)
        draw the {covering} in the {room}
        the (sun|light) is (shining|coming) in my eyes in the {room}
        {room} {covering} closed
        (could you|can you) get the {covering} down
        (close|shut) all the {covering}
        close the {covering} at {clock}
        close the {covering} when it gets dark
        the neighbours can see into the {room} (close|shut) the {covering}
        too bright in here let the {covering} down
        i'd like the {covering} (closed|shut) in the {room}
        lower the {covering} in the {room} to {percent}
        the {covering} can come down now
        move the {covering} down (a bit|halfway|)
        block the (sun|sunlight) in the {room}
        there's glare on the (screen|television) (close|lower) the {covering}
        it's getting too hot with the sun in the {room} (shut|close) the {covering}
        ~i don't want people looking in {room} {covering}
        ~shield the {room} from the afternoon sun
        ~some privacy in the {room} please
        ~cover the windows in the {room}
        ~the street lamp shines right into the {room} window cover it
    """,
    "door_lock": """
        lock the {door}
        (please |)lock up (the house|the {door}|everything)
        (make sure|check that) the {door} is locked
        lock the {door} behind (me|{someone})
        i forgot to lock the {door}
        (could you|can you) lock the {door}
        lock all the doors
        we're (leaving|going out) lock the {door}
        the {door} should be locked (now|at {clock}|)
        bolt the {door}
        {door} locked please
        is the {door} open then lock it
        secure the {door}
        lock the {door} when {someone} has left
        lock the {door} at {clock}
        did i lock the {door} if not lock it
        i'm in bed lock the {door}
        keep the {door} locked (while we're away|tonight|)
        close and lock the {door}
        nobody should come in through the {door}
        put the lock on the {door}
        ~i'm out of the house now secure everything
        ~don't let anybody in by the {door}
        ~turn the key in the {door}
        ~{someone} is gone you can bolt up
        ~i drove off without doing the {door}
    """,
    "door_unlock": """
        unlock the {door}
        open the {door} (for {someone}|)
        let {someone} in
        let {someone} in through the {door}
        (i'm|we're) at the {door} (open up|let me in)
        (could you|can you) unlock the {door}
        unlock the {door} at {clock}
        {someone} is at the {door} (open|unlock) it
        the {door} should be unlocked for {someone}
        {door} unlocked please
        i forgot my key open the {door}
        unlock all the doors
        (i'm|we're) home open the {door}
        take the lock off the {door}
        buzz {someone} in
        leave the {door} unlocked (for {someone}|)
        {someone} is waiting outside the {door}
        don't lock the {door} {someone} is coming
        unlock the {door} when {someone} rings
        my hands are full open the {door}
        somebody locked me out (unlock|open) the {door}
        ~{someone} can't get in
        ~i'm standing on the doorstep without a key
        ~release the {door}
        ~that'll be {someone} ringing please get the {door}
        ~give {someone} access by the {door}
    """,
    "alarm_set": """
        wake me (up |)at {clock} {day}
        set an alarm for {clock}
        set (an|the) alarm for {clock} {day}
        alarm at {clock} (please|)
        i need to (get up|be up) at {clock} {day}
        (could you|can you) wake me at {clock}
        wake me in {duration}
        alarm {day} at {clock}
        move my alarm to {clock}
        make the alarm ring at {clock} {day}
        i have to be awake by {clock} {day}
        set the alarm clock {duration} (earlier|later)
        wake {someone} at {clock}
        get me out of bed at {clock} {day}
        same alarm as usual but at {clock}
        set my wake up (call |)for {clock}
        i want to sleep until {clock}
        don't let me sleep past {clock}
        wake me with {music} at {clock}
        change the {clock} alarm to {clock}
        turn on the {clock} alarm {day}
        ~rouse me at {clock} {day}
        ~i mustn't oversleep {day} i start at {clock}
        ~ring me out of my dreams at {clock}
        ~up at {clock} {day} please
        ~my train goes early get me up by {clock}
    """,
    "timer_set": """
        set a timer for {duration}
        (start|set) a {duration} timer
        timer {duration}
        {duration} for the {dish}
        (tell me|let me know|beep) when {duration} are (over|up)
        (could you|can you) time {duration} for the {dish}
        count down {duration}
        the {dish} (needs|takes) {duration} set a timer
        set a {dish} timer for {duration}
        put {duration} on the clock
        (add|give me) {duration} more on the timer
        start the countdown for the {dish}
        timer for the {dish} please {duration}
        i need {duration} for my {dish}
        ring in {duration} the {dish} (is|are) in the oven
        {duration} from now the {dish} must come out
        start timing {duration} now
        set the kitchen timer to {duration}
        give {someone} {duration} to tidy up set a timer
        another timer for {duration}
        make it {duration} on the {dish} timer
        ~i've just put the {dish} on shout in {duration}
        ~don't let the {dish} burn it wants {duration}
        ~clock {duration} for me
        ~the {dish} should be ready in {duration} keep an eye on the time
        ~stopwatch down from {duration}
    """,
    "reminder_set": """
        remind me to {task}
        remind me to {task} {day}
        remind me at {clock} to {task}
        remind me in {duration} to {task}
        don't let me forget to {task}
        (could you|can you) remind me that i have to {task} {day}
        set a reminder to {task} (at {clock}|{day}|)
        i have to {task} {day} (remind me|don't let me forget)
        reminder {task} {day}
        (make|take) a note to {task}
        tell me at {clock} to {task}
        when i get home remind me to {task}
        put {task} on my list for {day}
        remind {someone} to {task}
        note that i should {task} {day}
        i must remember to {task}
        i always forget to {task} remind me
        add a reminder {task} at {clock}
        remind me about the {appliance} (at {clock}|in {duration}|{day})
        remind me to buy {item} {day}
        remind me to turn off the {appliance} in {duration}
        ~nudge me {day} i need to {task}
        ~it would be bad if i didn't {task} {day}
        ~keep in mind that i want to {task}
        ~poke me at {clock} about having to {task}
        ~help me remember to {task}
    """,
    "music_play": """
        play {music}
        play {music} in the {room}
        put on {music}
        put {music} on in the {room}
        (start|turn on) {music}
        (i want|i'd like) to (hear|listen to) {music}
        (could you|can you) play {music}
        let's (hear|have) {music}
        turn the (radio|music|speaker) on in the {room}
        {music} please
        play {music} for {someone}
        continue the (music|song|playlist) (in the {room}|)
        play that (song|track) again
        next (song|track) please
        skip this one
        i'm in the mood for {music}
        music on in the {room}
        start {music} at {clock}
        play {music} while i cook {dish}
        switch to {music}
        play something {someone} likes
        ~give us {music}
        ~it's too quiet in the {room} how about {music}
        ~get the speakers in the {room} going with {music}
        ~carry on with {music}
        ~entertain {someone} with {music}
    """,
    "music_stop": """
        stop the (music|song|radio|playlist)
        (turn|switch) off the (music|radio|speaker) in the {room}
        (pause|stop) (playing|) {music}
        music off in the {room}
        pause the (song|music|playlist)
        (turn|switch) the (radio|music|speaker) off
        no more music (in the {room}|please|)
        i don't want to (hear|listen to) this any more
        (could you|can you) stop playing
        {someone} is on the phone stop the music
        that's enough {music}
        (silence|quiet) in the {room} please
        stop playing in the {room} at {clock}
        stop it i hate this song
        hold the music for {duration}
        kill the music
        cut the sound in the {room}
        stop the music when the song is over
        turn off {music}
        i've had enough of {music}
        (end|quit) the playlist
        ~give my ears a rest
        ~i can't concentrate with {music} going
        ~that track has played long enough make it end
        ~shut the speaker up in the {room}
        ~we have heard enough songs for today
    """,
    "volume_set": """
        (turn|bring) the (music|radio|sound|television|volume) (up|down) (a bit|in the {room}|)
        (louder|quieter) (please|in the {room}|)
        set the volume to {percent}
        volume (up|down|at {percent})
        make the (music|radio|television) (louder|quieter)
        the (music|radio|television) is too (loud|quiet)
        i can't hear the (music|radio|television) (in the {room}|)
        (raise|lower|increase|reduce) the volume (in the {room}|to {percent}|)
        (could you|can you) turn it (up|down) a (bit|little|notch)
        {music} but not so loud
        {music} a bit louder
        mute the (speaker|television|radio) (in the {room}|for {duration}|)
        not so loud {someone} is sleeping
        crank up {music}
        turn the speaker in the {room} to {percent}
        the neighbours are complaining turn it down
        unmute the (television|speaker)
        play it (softer|more quietly) in the {room}
        half the volume (in the {room}|)
        sound at {percent} in the {room}
        turn the bass (up|down)
        ~we can hear {music} all over the house it's deafening
        ~i'm missing half the words boost it
        ~tone it down in the {room}
        ~pump it up
        ~whisper level in the {room} please
    """,
    "vacuum_start": """
        (start|run) the (vacuum|robot|vacuum cleaner) (in the {room}|)
        vacuum the {room}
        clean the {room} (floor|carpet|)
        (send|let) the robot (into|to) the {room}
        (could you|can you) hoover the {room}
        the {room} is (dirty|dusty|full of crumbs)
        hoover (up |)under the {room} table
        there are crumbs all over the {room}
        have the robot clean the {room} at {clock}
        i spilled the {dish} in the {room} send the robot
        mop the {room} (floor|)
        start cleaning (the {room}|upstairs|downstairs)
        clean the house while we're out
        turn on the vacuum (in the {room}|)
        the cat made a mess in the {room}
        vacuum {day} at {clock}
        give the {room} (carpet|floor) a clean
        the {room} needs (a clean|vacuuming|hoovering)
        get the robot going in the {room}
        {someone} walked mud into the {room} clean it
        sweep the {room}
        ~i dropped the {dish} everywhere in the {room}
        ~get rid of the dust in the {room}
        ~the {room} floor is a disgrace
        ~time for the little robot to do its round
        ~tidy up the fluff in the {room}
    """,
    "shopping_add": """
        (add|put) {item} (to|on) the shopping list
        we need {item}
        we're out of {item}
        (add|put) {item} and {item} (to|on) the list
        (buy|get|order) {item}
        {item} on the shopping list (please|)
        i used up the {item}
        (could you|can you) write down {item} for the shop
        there's no {item} left
        the {item} (is|are) (finished|almost gone|empty)
        get more {item}
        i need {item} for the {dish}
        shopping list {item} {item} and {item}
        note {item} for the shopping
        add {item} for {someone}
        next time we shop get {item}
        order more {item} (for {day}|)
        we could do with some {item}
        {someone} wants {item} from the shop
        put another {item} on the list
        i need {item} {day}
        ~the cupboard has no {item} in it
        ~stock up on {item}
        ~nobody bought {item} again
        ~i'm scraping the bottom of the {item}
        ~pick {item} up at the supermarket
    """,
    "device_query": """
        is the {appliance} (still |)on
        is the {appliance} (done|finished|running)
        did i (turn off|leave on) the {appliance}
        how long does the {appliance} (still |)(need|take)
        when will the {appliance} be (done|finished)
        is the {light} in the {room} (still |)on
        is the {door} (locked|open|closed)
        are the {covering} in the {room} (open|closed|up|down)
        did i lock the {door}
        what's the {appliance} doing
        (could you|can you) check the {appliance}
        (which|how many) (lights|lamps) are on
        who left the {light} on in the {room}
        has the {appliance} (finished|stopped) yet
        how much power does the {appliance} use
        tell me if the {appliance} is on
        is anything (still on|left on) (in the {room}|)
        how much time is left on the timer
        what time is my alarm set for
        is the robot (done|stuck|charging)
        status of the {appliance}
        ~can i empty the {appliance} yet
        ~i have a feeling the {appliance} is still going
        ~somebody may have forgotten the {door} is it shut
        ~does the {room} still have its {light} burning
        ~how far along is the {appliance}
    """,
    "scene_set": """
        {scene} (mode|scene) (please|on|)
        (start|activate|set) the {scene} (mode|scene)
        it's {scene} time
        (get|make) the (house|{room}) ready for (bed|the night|the movie|dinner|guests|the party)
        good night
        good morning
        (we're|i'm) going to bed
        (we're|i'm) (leaving|going out)
        (we're|i'm) (home|back)
        (could you|can you) set the {room} to {scene} mode
        turn the {scene} scene (on|off)
        (movie|film) night in the {room}
        prepare the {room} for {someone}
        we're about to watch a film
        lights music and {covering} as usual for the {scene} evening
        everything off we're leaving
        {scene} atmosphere in the {room}
        dinner is ready set the mood
        guests are coming make the {room} nice
        we're going on holiday look after the house
        end the {scene} (mode|scene)
        ~that's me off to bed
        ~the film is about to begin
        ~set everything up as i like it for {scene}
        ~off to work see you later
        ~{someone} is coming over make it welcoming
    """,
}
